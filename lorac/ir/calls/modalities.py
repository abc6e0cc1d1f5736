"""Images and sounds in prompts: how transformers' models take them, as tables, and where prompts contain them.

A tower of the model computes features, a vector for each placeholder token of the prompts, in order. A vector replaces
the embedding of its token. Programs with a cache read the vectors as an input, and a token that has a vector is passed
as a negative id, ``feature_ids``.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lorac.errors import InputMismatch
from lorac.ir.calls.multimodal_positions import GRID_SUFFIX

SIZES, _BY_ROWS = "image_sizes", 5
"""The argument with the sizes of images that are cut into several images, and the number of axes of images by rows."""
FEATURES, OFFSETS, BLOCKS = "features", "position_offsets", "blocks"
"""Inputs of a capture: the vectors of each row (rows, count, size); the offsets from a token's index to its position on
each axis (rows, count, axes); the offsets from a token's index to the first and the last token that attend to each
other with it (rows, count, 2). The last offset of a row is used for all later tokens."""
PLACED = frozenset({FEATURES, OFFSETS, BLOCKS})
TOKEN_TYPES, KINDS = "token_type_ids", "mm_token_type_ids"
"""Arguments with a number for each token: which tokens attend to each other, and the kind of each token."""
TOKEN_ARGUMENTS = frozenset({TOKEN_TYPES, KINDS})


@dataclass(frozen=True)
class Modality:
    """A kind of input whose features a tower computes.

    Attributes:
        name: the kind, in words.
        method: the method of a model that computes the features.
        main: the method's argument with the images or sounds.
        token_fields: fields of a configuration that may hold the id of the placeholder.
        later: how models read features of later layers of the tower; None if no model does.
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
    """How a text model adds features of later layers of a tower after its own layers.

    Attributes:
        output: the field with these features in the output of the method for features.
        adds: the text model's method (hidden states, marks, features) -> hidden states.
        marks, features: arguments of the text model's forward.
    """

    output: str
    adds: str
    marks: str
    features: str


class TokenBlocks(NamedTuple):
    """The tokens that attend to each other, even to later ones, chosen by a type per token.

    Attributes:
        argument: the argument with the types.
        type: the type of tokens in a block.
        is_whole: whether all such tokens of a row are one block; else each contiguous piece is a block.
    """

    argument: str
    type: int
    is_whole: bool = False

    def find(self, types: Tensor) -> Tensor:
        """Return offsets from a token's index to the first and last token it sees, for each token and for later ones.

        Args:
            types: of a row's tokens (length,).

        Raises:
            InputMismatch: the row has several blocks and the model allows one.
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
"""model_type -> the tokens that attend to each other."""

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
"""Kinds of inputs. The kind of a prompt is the first row whose ``main`` is among the prompt's inputs."""


def find_modality(names: Collection[str]) -> Modality | None:
    """Return the row of ``MODALITIES`` for inputs with these names; None for text only."""
    return next((modality for modality in MODALITIES if modality.main in names), None)


def split_inputs(modality: Modality, inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split inputs into one dict per run of a tower; the features of the runs are concatenated.

    Images with different numbers of patches run one by one, since a trace of one image cannot split several. Images
    stored by rows and padded with zero images run as one batch without the padding.

    Args:
        modality: the kind of the inputs.
        inputs: the inputs that the model's processor makes.
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
    """Return the ids of placeholders: -1 for a row's first, -2 for its second; ids of other tokens are arbitrary.

    Args:
        marks: (rows, length): true for placeholders.
    """
    return -marks.long().cumsum(1)


def find_blocks(groups: Tensor, positions: Tensor) -> Tensor:
    """Return the first and last position of each token's group (rows, length, 2); for group -1, the token's position.

    Args:
        groups: (rows, length): group numbers; a group is contiguous.
        positions: (rows, length).
    """
    same = (groups[:, :, None] == groups[:, None]) & (groups >= 0)[..., None]
    seen = torch.where(same, positions[:, None], positions[..., None])
    return torch.stack([seen.amin(-1), seen.amax(-1)], -1)


def leave_block(blocks: Tensor, place: int, *, ahead: bool) -> int:
    """Return the nearest index, ahead or back, at which a row can be cut without cutting a block.

    Args:
        blocks: offsets of a row (count, 2), as ``TokenBlocks.find`` returns them.
        place: index of a token.
    """
    first, last = blocks[min(place, len(blocks) - 1)].tolist()
    return place if not first else place + (last + 1 if ahead else first)


def pad_rows(parts: Collection[Tensor]) -> Tensor:
    """Stack tensors (count, size); pad shorter tensors by repeating their last vector, empty tensors by zeros."""
    longest = max(1, *(len(part) for part in parts))
    filled = [part if len(part) else part.new_zeros(1, part.shape[1]) for part in parts]
    return torch.stack([part[torch.arange(longest).clamp(max=len(part) - 1)] for part in filled])
