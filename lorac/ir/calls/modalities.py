"""Images and sounds in prompts: how transformers' models take them, as data, and where a prompt holds them.

A tower of the model computes features, a vector for each placeholder token of the prompts, in their order. A vector
stands in the place of the embedding of its token. Programs that keep a cache read the vectors next to their cache, and
a token that has one comes as a negative id, ``feature_ids``.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorac.errors import InputMismatch
from lorac.ir.calls.multimodal_positions import GRID_SUFFIX

SIZES, _BY_ROWS = "image_sizes", 5
"""The argument with the sizes of images that are cut into several, and the axes of images by rows."""
FEATURES, OFFSETS, BLOCKS = "features", "position_offsets", "blocks"
"""Inputs of a capture: the vectors of each row (rows, count, size), what is added to a token's number to give its
position on each axis (rows, count, axes), and to give the first and the last of the tokens that see each other with it
(rows, count, 2); the last of both is for all later tokens too."""
PLACED = frozenset({FEATURES, OFFSETS, BLOCKS})
TOKEN_TYPES, KINDS = "token_type_ids", "mm_token_type_ids"
"""Arguments with a number for each token: which see each other, and of which kind each is."""
TOKEN_ARGUMENTS = frozenset({TOKEN_TYPES, KINDS})


@dataclass(frozen=True)
class Modality:
    """A kind of input that a tower computes.

    Attributes:
        name: the kind, in words.
        method: the method of a model that computes the features.
        main: its argument with the images or sounds.
        token_fields: fields of a configuration that may hold the id of the placeholder.
        later: how models read features of later layers of the tower, if some do.
    """

    name: str
    method: str
    main: str
    token_fields: tuple[str, ...]
    later: "LaterFeatures | None" = None

    def find_token(self, config: Mapping[str, object]) -> int | None:
        """Return the placeholder's token id from a configuration's entries, or None."""
        found = (config.get(name) for name in self.token_fields)
        return next((value for value in found if isinstance(value, int)), None)


class LaterFeatures(NamedTuple):
    """How a text model adds features of later layers of a tower behind its own layers.

    Attributes:
        output: the field with these features in the output of the method for features.
        adds: the text model's method (hidden states, marks, features) -> hidden states.
        marks, features: the arguments of its forward.
    """

    output: str
    adds: str
    marks: str
    features: str


class TokenBlocks(NamedTuple):
    """The tokens that see each other, later ones too, by a type of each token.

    Attributes:
        argument: holds the types.
        type: that of tokens in a block.
        is_whole: whether all of a row are one block, else each piece is.
    """

    argument: str
    type: int
    is_whole: bool = False

    def find(self, types: Tensor) -> Tensor:
        """Return the terms that the numbers of a row's tokens, and of all later ones, get to give first and last.

        Args:
            types: of a row's tokens (length,).

        Raises:
            InputMismatch: the row has several blocks where the model knows one.
        """
        inside = types.eq(self.type)
        begins = inside & ~torch.cat([inside.new_zeros(1), inside])[:-1]
        if self.is_whole and int(begins.sum()) > 1:
            raise InputMismatch(
                f"the tokens with {self.argument} {self.type} are not in one piece",
                next_step="give them as the model's processor does",
            )
        groups, numbers = torch.where(inside, begins.cumsum(0), -1)[None], torch.arange(len(types))[None]
        return torch.cat([find_blocks(groups, numbers)[0] - numbers.T, numbers.new_zeros(1, 2)])


BLOCK_TYPES: Mapping[str, TokenBlocks] = {
    "gemma3": TokenBlocks(TOKEN_TYPES, 1),
    "paligemma": TokenBlocks(TOKEN_TYPES, 0, is_whole=True),
}
"""model_type -> the tokens that see each other."""

MODALITIES = (
    Modality(
        "image",
        "get_image_features",
        "pixel_values",
        ("image_token_id", "image_token_index"),
        LaterFeatures("deepstack_features", "_deepstack_process", "visual_pos_masks", "deepstack_visual_embeds"),
    ),
    Modality("sound", "get_audio_features", "input_features", ("audio_token_id", "audio_token_index")),
)
"""A model's prompts have the kind of the first row whose ``main`` is among their inputs."""


def find_modality(names: Collection[str]) -> Modality | None:
    """Return the row of ``MODALITIES`` for inputs of these names; None for text alone."""
    return next((modality for modality in MODALITIES if modality.main in names), None)


def split_inputs(modality: Modality, inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Return the inputs of each run of a tower, whose features follow one another.

    Images that are cut into patches of their own number run one by one, as a trace of one cannot divide them. Of those
    that lie by rows, padded with images of zeros, the rest is one batch.

    Args:
        modality: of the inputs.
        inputs: as the model's processor makes them.
    """
    given = dict(inputs)
    pixels, grids = given[modality.main], {name for name in given if name.endswith(GRID_SUFFIX)}
    if grids:
        (name,) = grids
        parts = zip(pixels.split(given[name].prod(-1).tolist()), given[name], strict=True)
        return [{**given, modality.main: part, name: grid[None]} for part, grid in parts]
    if pixels.dim() != _BY_ROWS or SIZES in given:
        return [given]
    flat = {name: value.flatten(0, 1)[:, None] for name, value in given.items()}
    real = flat[modality.main].flatten(1).ne(0).any(1)
    return [{name: value[real] for name, value in flat.items()}]


def feature_ids(marks: Tensor) -> Tensor:
    """Return the ids of placeholders: -1 for a row's first, -2 for its second; arbitrary at other tokens.

    Args:
        marks: (rows, length): which tokens are placeholders.
    """
    return -marks.long().cumsum(1)


def find_blocks(groups: Tensor, positions: Tensor) -> Tensor:
    """Return the first and the last position of each token's group (rows, length, 2), its own where the group is -1.

    Args:
        groups: (rows, length): numbers of groups that lie in one piece.
        positions: (rows, length).
    """
    same = (groups[:, :, None] == groups[:, None]) & (groups >= 0)[..., None]
    seen = torch.where(same, positions[:, None], positions[..., None])
    return torch.stack([seen.amin(-1), seen.amax(-1)], -1)


def leave_block(blocks: Tensor, place: int, *, ahead: bool) -> int:
    """Return the nearest place, ahead or back, before whose token no block is cut.

    Args:
        blocks: of a row (count, 2), as ``TokenBlocks.find`` returns them.
        place: a token's number.
    """
    first, last = blocks[min(place, len(blocks) - 1)].tolist()
    return place if not first else place + (last + 1 if ahead else first)


def pad_rows(parts: Collection[Tensor]) -> Tensor:
    """Stack tensors (count, size) of rows, one or more of each row; shorter ones repeat their last vector."""
    longest = max(1, *(len(part) for part in parts))
    filled = [part if len(part) else part.new_zeros(1, part.shape[1]) for part in parts]
    return torch.stack([part[torch.arange(longest).clamp(max=len(part) - 1)] for part in filled])
