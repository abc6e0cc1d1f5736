"""Text with images in it: ids that stand for the pieces of images, as many as the model makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorac.frontend.copying import copy_structure

_NAMES = ("image_token_id", "image_token_index")
"""What configurations call the id that stands for a piece of an image."""
PIXEL_VALUES = "pixel_values"


def get_image_token(config: Any) -> int | None:
    """The id that stands for a piece of an image; None where a model has none."""
    found = (getattr(config, name, None) for name in _NAMES)
    return next((token for token in found if isinstance(token, int)), None)


@torch.no_grad()
def insert_image_tokens(model: nn.Module, ids: Tensor, pixels: Tensor, token: int) -> dict[str, Tensor] | None:
    """Ids and pixels that fit each other, of one image a row; None where the model does not say how many pieces it has.

    Args:
        model: is asked on a copy, and left as it was.
        ids: (rows, length).
        pixels: (rows, channels, height, width); a model that takes several images a row gets a list of one.
        token: the placeholder.
    """
    copied = copy_structure(model).eval()
    for look, shaped in itertools.product(_list_image_encoders(copied), (pixels, pixels.unsqueeze(1))):
        pieces, odd = divmod(_count_image_features(look, shaped), len(ids))
        if pieces and not odd:
            marks = ids.new_full((len(ids), pieces), token)
            words = torch.where(ids == token, token - 1 if token else 1, ids)
            return {"input_ids": torch.cat([words[:, :1], marks, words[:, 1:]], 1), PIXEL_VALUES: shaped}
    return None


def _list_image_encoders(model: Any) -> Iterator[Callable[..., Any]]:
    """What a transformers model has to make features of images."""
    for owner in (model, model.base_model):
        look = getattr(owner, "get_image_features", None)
        if look is not None:
            yield look


def _count_image_features(look: Callable[..., Any], pixels: Tensor) -> int:
    """How many vectors the features of all images are; 0 where they are not made of pixels of this shape alone."""
    try:
        features = look(**{PIXEL_VALUES: pixels})
    except Exception:
        return 0
    found = getattr(features, "pooler_output", features)
    parts = found if isinstance(found, list | tuple) else [found]
    return sum(part.numel() // part.shape[-1] for part in parts)
