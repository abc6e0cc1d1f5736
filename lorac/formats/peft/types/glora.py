"""PEFT type GLORA, which multiplies W elementwise by A, where LyCORIS's GLoRA multiplies matrices.

Source: peft.tuners.glora of PEFT 0.21. For each of A to E a module has `glora_<A>.Xd` and `glora_<A>.Xu`, or
`glora_<A>.X`, or zeros `glora_<A>.zeros` of the full shape if the part is not configured. At layers without a bias C, D
and E are always zeros.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lorac.formats._config_fields import Applied, TrainingOnly, read_choice, read_size
from lorac.formats.peft.fields import WITHOUT_FAN, bias
from lorac.formats.peft.peft_type import Tensors
from lorac.formats.peft.plain_type import PlainType
from lorac.ir.sites.site import Site
from lorac.variants.glora_hadamard import GLoRAHadamard

_EMPTY = ".zeros"
_ROWS = ("A.Xd", "A.X", "A.zeros", "D.X", "D.zeros")
"""Tensors with an axis of outputs, the first."""
_COLUMNS = {"A.Xu": 1, "A.zeros": 1, "C.Xd": 0, "C.X": 0, "C.zeros": 0}
"""Tensor -> its axis of inputs."""


class GloraType(PlainType[GLoRAHadamard]):
    """GLORA."""

    peft_type = "GLORA"
    variants = {GLoRAHadamard: {}}
    fields = {
        **WITHOUT_FAN,
        "r": Applied(8, to="r", read=read_size),
        "config_A_B": Applied("lora", to="config_A_B", read=read_choice("lora", "vector", "constant", "none")),
        "config_C": Applied("lora", to="config_C", read=read_choice("lora", "vector", "none")),
        "config_D_E": Applied("constant", to="config_D_E", read=read_choice("vector", "constant", "none")),
        "bias": bias("glora"),
        "init_weights": TrainingOnly(True),
    }
    suffixes = tuple(f"glora_{name}.{part}" for name in "ABCDE" for part in ("Xd", "Xu", "X", "zeros"))

    def read_site(self, variant: GLoRAHadamard, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return the site and its parameters, without the zeros of absent parts, which only show sizes."""
        kept = {suffix: tensor for suffix, tensor in stored.items() if not suffix.endswith(_EMPTY) or tensor.any()}
        site, tensors = super().read_site(variant, path, kept)
        rows, columns = self.measure(variant, stored)
        return replace(site, out_features=rows, in_features=columns), tensors

    def measure(self, variant: GLoRAHadamard, stored: Tensors) -> tuple[int, int]:
        shapes = {suffix.removeprefix("glora_"): (*tensor.shape, 1, 1) for suffix, tensor in stored.items()}
        rows = max((shape[0] for name, shape in shapes.items() if name in _ROWS), default=1)
        columns = max((shape[_COLUMNS[name]] for name, shape in shapes.items() if name in _COLUMNS), default=1)
        return rows, columns

    def write_site(self, variant: GLoRAHadamard, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        rows, columns = site.out_features, site.in_features
        sizes = {"A": (rows, columns), "B": (rows, columns), "C": (columns, 1), "D": (rows,), "E": (rows,)}
        absent = [name for name in sizes if not any(key.startswith(f"glora_{name}_") for key in tensors)]
        like = next(iter(tensors.values()), torch.zeros(0))
        written = super().write_site(variant, site, tensors)
        return written | {f"glora_{name}{_EMPTY}": like.new_zeros(sizes[name]) for name in absent}
