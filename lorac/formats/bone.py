"""Bone's own files: ``<layer>.bone``, with three axes for the block affine transformation (BAT) and two for MiSS.

Source: JL-er/Bone and RWKV-PEFT. ``lorac.formats.peft.types.miss`` has PEFT's later names of both.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from lorac.argument_types import JsonMapping
from lorac.formats._authors import AuthorsFormat, KeyRow, Tensors, find_size
from lorac.formats._errors import unsupported_error
from lorac.variants.bat import BAT
from lorac.variants.miss import MiSS

_BLOCK = "miss_block"


class BoneFormat(AuthorsFormat):
    """Bone's own files."""

    name = "bone"
    looks_for = "a file with tensors <layer>.bone"
    written_by = "Bone's authors; RWKV-PEFT"
    methods = (BAT, MiSS)
    rows = (KeyRow("base_model.model.*.bone", "*", _BLOCK), KeyRow("*.bone", "*", _BLOCK))
    mark = re.compile(r"\.bone$")
    weights = "bone.pt"

    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> BAT | MiSS:
        axes = {stored[_BLOCK].ndim: path for path, stored in tensors.items()}
        if len(axes) > 1 or not axes.keys() <= {2, 3}:
            raise unsupported_error(
                f"'{file}' has blocks of {' and '.join(map(str, sorted(axes)))} axes, one at '{min(axes.values())}'",
                next_step="a block of 3 axes is of Bone's first version, and one of 2 of the later ones, MiSS",
            )
        if 3 in axes:
            return BAT(r=find_size(tensors, _BLOCK, 1, file))
        return MiSS(r=find_size(tensors, _BLOCK, 0, file))


FORMAT = BoneFormat()
