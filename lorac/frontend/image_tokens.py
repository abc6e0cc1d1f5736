"""Token sequences with images: ids that stand for the patches of images, as many as the model makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lorac.frontend.copying import copy_structure

_FIELDS = ("image_token_id", "image_token_index")
"""Names in configurations of the id that stands for a patch of an image."""
PIXEL_VALUES = "pixel_values"


def get_image_token(config: object) -> int | None:
    """Return the id that stands for a patch of an image; None for models without one."""
    tokens = (getattr(config, name, None) for name in _FIELDS)
    return next((token for token in tokens if isinstance(token, int)), None)


@torch.no_grad()
def insert_image_tokens(model: nn.Module, ids: Tensor, pixels: Tensor, token: int) -> dict[str, Tensor] | None:
    """Return ids and pixels that fit each other, of one image a row; None where the number of patches cannot be found.

    Args:
        model: left unchanged; a copy encodes the images.
        ids: (rows, length).
        pixels: (rows, channels, height, width); a model that takes several images a row gets a list of one.
        token: the id that stands for a patch.
    """
    copied = copy_structure(model).eval()
    for encode, images in itertools.product(_image_encoders(copied), (pixels, pixels.unsqueeze(1))):
        patches, rest = divmod(_count_features(encode, images), len(ids))
        if patches and not rest:
            marks = ids.new_full((len(ids), patches), token)
            words = torch.where(ids == token, token - 1 if token else 1, ids)
            return {"input_ids": torch.cat([words[:, :1], marks, words[:, 1:]], 1), PIXEL_VALUES: images}
    return None


def _image_encoders(model: Any) -> Iterator[Callable[..., Any]]:
    """Yield the methods of a transformers model that make features of images."""
    for owner in (model, model.base_model):
        encode = getattr(owner, "get_image_features", None)
        if encode is not None:
            yield encode


def _count_features(encode: Callable[..., Any], pixels: Tensor) -> int:
    """Count the feature vectors of all images; 0 where pixels of this shape alone do not suffice."""
    try:
        features = encode(**{PIXEL_VALUES: pixels})
    except Exception:
        return 0
    pooled = getattr(features, "pooler_output", features)
    parts = pooled if isinstance(pooled, list | tuple) else [pooled]
    return sum(part.numel() // part.shape[-1] for part in parts)
