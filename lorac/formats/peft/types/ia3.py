"""PEFT type IA3.

Source: peft.tuners.ia3 of PEFT 0.21 (config.py, layer.py). In a file a module has `ia3_l`: (out, 1), or (1, in) in
feedforward modules; at convolutions (1, C, 1, 1[, 1]), where C is the number of output or input channels. So a file
shows only one of a layer's two sizes.
"""

import re

from torch import Tensor

from lorac.formats._config_fields import Applied, TrainingOnly, read_pattern
from lorac.formats._errors import unsupported_error
from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.peft.fields import COMMON, EXCLUDE
from lorac.formats.peft.peft_type import PeftType, Tensors, mismatched_shapes
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.entrywise import IA3

SCALE = "ia3_l"


def write_feedforward(value: str | tuple[str, ...]) -> str | list[str]:
    """Return one pattern, since PEFT requires a list to be a subset of the list of targets.

    An empty list stays a list, since PEFT would replace null by its own choice.
    """
    if isinstance(value, str):
        return value
    return f".*({'|'.join(re.escape(name) for name in sorted(value))})" if value else []


class Ia3Type(PeftType[IA3]):
    """IA3."""

    peft_type = "IA3"
    variants = {IA3: {}}
    fields = {
        **COMMON,
        **EXCLUDE,
        "feedforward_modules": Applied(to="feedforward", read=read_pattern, write=write_feedforward),
        "init_ia3_weights": TrainingOnly(True),
    }
    suffixes = (SCALE,)
    kinds = frozenset({SiteKind.LINEAR, SiteKind.CONV2D, SiteKind.CONV3D})
    conv1d = grouped = pads_itself = True

    def read_site(self, variant: IA3, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return l (out, 1) or (1, in), and a site with that size as input and output features."""
        scale, size = stored[SCALE], stored[SCALE].numel()
        shape = (1, size) if variant.scales_input(path) else (size, 1)
        flat = scale.ndim == len(shape)
        if scale.shape != (shape if flat else (1, size, *(1,) * (scale.ndim - 2))) or not 2 <= scale.ndim <= 5:
            expected = f"by feedforward_modules {SCALE} is {shape} there, and (1, C, 1, 1) at convolutions"
            raise mismatched_shapes(path, stored, expected)
        site = matrix_site(path, size, size) if flat else conv_site(path, size, size, (1,) * (scale.ndim - 2), 1)
        return site, {SCALE: scale.reshape(shape)}

    def write_site(self, variant: IA3, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        if not (variant.scales_bias or variant.scales_input(site.path)):
            raise unsupported_error(
                f"PEFT's IA3 scales the bias of '{site.path}' with its weight, and scales_bias=False does not",
                next_step="use format='kohya', or 'native'",
            )
        scale = tensors[SCALE]
        return {SCALE: scale if site.conv is None else scale.reshape(1, -1, *(1,) * len(site.conv.kernel))}
