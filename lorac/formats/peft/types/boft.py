"""PEFT type BOFT.

Source: peft.tuners.boft of PEFT 0.21 (config.py, layer.py). In a file a module has `boft_R` (m, blocks, β, β) and
`boft_s` (out, 1), at convolutions (1, out). Without its CUDA extension PEFT uses one factor regardless of the
configuration, and boft_R in such a file has one factor.
"""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, TrainingOnly, read_count, read_size
from lorac.formats._errors import unsupported_error
from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.peft.fields import COMMON, STARTED, bias
from lorac.formats.peft.peft_type import PeftType, Tensors, mismatched_shapes
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.boft import BOFT

ROTATION, SCALE = "boft_R", "boft_s"


class BoftType(PeftType[BOFT]):
    """BOFT."""

    peft_type = "BOFT"
    variants = {BOFT: {}}
    fields = {
        **COMMON,
        **STARTED,
        "boft_block_size": Applied(4, to="block_size", read=read_count),
        "boft_block_num": Applied(0, to="block_num", read=read_count),
        "boft_n_butterfly_factor": Applied(1, to="n_butterfly_factor", read=read_size),
        "boft_dropout": TrainingOnly(0.0),
        "bias": bias("boft"),
    }
    suffixes = (ROTATION, SCALE)
    kinds = frozenset({SiteKind.LINEAR, SiteKind.CONV2D})

    def read_site(self, variant: BOFT, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        rotation, scale = stored.get(ROTATION), stored.get(SCALE)
        if rotation is None or scale is None or rotation.ndim != 4 or scale.ndim != 2 or 1 not in scale.shape:
            raise mismatched_shapes(
                path, stored, f"{ROTATION} is (m, blocks, size, size), {SCALE} (out, 1) or (1, out)"
            )
        out, columns = scale.numel(), rotation.shape[1] * rotation.shape[2]
        is_column = scale.shape[1] == 1
        site = matrix_site(path, out, columns) if is_column else conv_site(path, out, columns, (1, 1), 1)
        return site, {ROTATION: rotation, SCALE: scale.reshape(-1, 1)}

    def write_site(self, variant: BOFT, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        if variant.rotates_output:
            raise unsupported_error(
                f"PEFT's BOFT rotates the input of '{site.path}', and rotates_output=True its output",
                next_step="use format='kohya', or 'native'",
            )
        return {**tensors, SCALE: tensors[SCALE] if site.conv is None else tensors[SCALE].t()}

    def refine_variant(self, variant: BOFT, values: JsonMapping, stored: Mapping[str, Tensors]) -> BOFT:
        counts = {
            len(tensors[ROTATION]) for tensors in stored.values() if ROTATION in tensors and tensors[ROTATION].ndim
        }
        return dataclasses.replace(variant, n_butterfly_factor=1) if counts == {1} else variant
