"""GLoRA in LyCORIS's form and in PEFT's: low-rank changes of the weight and of the layer's input.

Chavan et al. 2023, arXiv 2306.07967, in the form of LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS,
lycoris/modules/glora.py), with its names and start values; the paper also has changes of the bias.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Count, OneOf
from lorac.errors import OptionError
from lorac.variants._layer_shapes import kernel_columns, require_one_group
from lorac.variants.base import MATRIX_KINDS, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import kaiming_uniform, zeros
from lorac.variants.low_rank import ScaledRank


@dataclass(frozen=True, kw_only=True)
class GLoRA(ScaledRank, WeightVariant):
    """``W' = W + s·(W·a1·a2 + b1·b2)`` with s = alpha/r, a1 (in, r), a2 (r, in), b1 (out, r), b2 (r, in).

    At a convolution a1 (channels, r) and a2 (r, channels) mix the input's channels, in the same way at all taps.
    """

    name = "glora"
    paper = (
        "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, arXiv 2306.07967; LyCORIS, arXiv 2309.14859"
    )
    kinds = MATRIX_KINDS - {SiteKind.EMBEDDING}

    def check(self, site: Site) -> None:
        super().check(site)
        require_one_group(self.name, site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        channels, taps = kernel_columns(site)
        return {
            "a1": ParamSpec((channels, self.r), kaiming_uniform),
            "a2": ParamSpec((self.r, channels), zeros),
            "b1": ParamSpec((site.out_features, self.r), kaiming_uniform),
            "b2": ParamSpec((self.r, channels * taps), zeros),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        taps = W.shape[1] // p.a1.shape[0]
        a1, a2 = p.a1, p.a2
        if taps > 1:
            eye = torch.eye(taps, dtype=a1.dtype, device=a1.device)
            a1, a2 = torch.kron(a1, eye), torch.kron(a2, eye)
        return W + self.scale * ((W @ a1) @ a2 + p.b1 @ p.b2)


@dataclass(frozen=True, kw_only=True)
class GLoRAHadamard(WeightVariant):
    """``W' = W + W∘A + B`` and ``b' = b + b∘D + E + W·C``; layers without a bias have no C, D and E.

    GLoRA as in PEFT: changes of weight and bias that scale their entries, and an offset of the input. Chavan et al.
    2023, arXiv 2306.07967, equation 6, with W∘A for the paper's product; forms and start values as in PEFT's GLORA.
    ``lorac.GLoRA`` is LyCORIS's form.

    ``"lora"`` is Xd·Xu of rank r, ``"vector"`` one number per output (per input for C), ``"constant"`` one number, and
    ``"none"`` omits a change.

    Attributes:
        r: rank of the changes in the form ``"lora"``.
        config_A_B: form of A and B (out, in).
        config_C: form of C (in, 1).
        config_D_E: form of D and E (out,).
    """

    r: Count = 8
    config_A_B: Annotated[str, OneOf(("lora", "vector", "constant", "none"))] = "lora"
    config_C: Annotated[str, OneOf(("lora", "vector", "none"))] = "lora"
    config_D_E: Annotated[str, OneOf(("vector", "constant", "none"))] = "constant"

    name = "glora_hadamard"
    paper = "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning, arXiv 2306.07967"
    kinds = frozenset({SiteKind.LINEAR})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias != "none" and self.config_D_E != "none":
            raise OptionError(
                f"GLoRA's D scales the base's bias, and bias='{self.bias}' trains that bias itself",
                next_step="give bias='none', or config_D_E='none'",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        forms = {"A": self.config_A_B, "B": self.config_A_B}
        if site.bias is not None:
            forms |= {"C": self.config_C, "D": self.config_D_E, "E": self.config_D_E}
        rows, columns = site.out_features, site.in_features
        sizes = {"A": (rows, columns), "B": (rows, columns), "C": (columns, 1), "D": (rows,), "E": (rows,)}
        specs = {}
        for name, form in forms.items():
            size = sizes[name]
            shapes: dict[str, dict[str, tuple[int, ...]]]
            shapes = {"vector": {"X": (size[0], 1)[: len(size)]}, "constant": {"X": (1,)}, "none": {}}
            for part, shape in shapes.get(form, {"Xd": (size[0], self.r), "Xu": (self.r, size[-1])}).items():
                specs[f"glora_{name}_{part}"] = ParamSpec(shape, kaiming_uniform if part == "Xu" else zeros)
        return specs

    def weight(self, W: Tensor, p: Params) -> Tensor:
        scale, shift = _read_change(p, "A"), _read_change(p, "B")
        return W if scale is None or shift is None else W + W * scale + shift

    def compute_bias(self, W: Tensor, b: Tensor, p: Params) -> Tensor:
        offset, scale, shift = (_read_change(p, name) for name in "CDE")
        moved = b if scale is None or shift is None else b + b * scale + shift
        return moved if offset is None else moved + (W @ offset)[:, 0]


def _read_change(p: Params, name: str) -> Tensor | None:
    """Return a change that broadcasts to the weight or bias; None if the configuration omits it."""
    tensors = vars(p)
    if f"glora_{name}_Xd" in tensors:
        product: Tensor = tensors[f"glora_{name}_Xd"] @ tensors[f"glora_{name}_Xu"]
        return product
    return tensors.get(f"glora_{name}_X")
