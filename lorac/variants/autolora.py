"""AutoLoRA's gated fusion: several LoRAs in every layer, each let through channel by channel by a gate of its own.

"AutoLoRA: Automatic LoRA Retrieval and Fine-Grained Gated Fusion for Text-to-Image Generation", Li et al. 2025, arXiv
2508.02107. (Another method of that name searches ranks.) Only the gates are trained. The variant with all terms is
put together from the released ones, whose table lacks it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from lorac.errors import AdapterError, FormatError, nearest_name
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site, SiteKind
from lorac.variants import _initialisers as _inits
from lorac.variants._experts import expert_specs
from lorac.variants._routed import RoutedVariant, from_loras
from lorac.variants.adapter import Adapter
from lorac.variants.base import Context
from lorac.variants.params import Init, InitContext, ParamSpec, Role

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class AutoLoRA(RoutedVariant):
    """``y' = y + Σ_i w_out∘g_i∘l_i``, l_i = B_i·A_i·x, g_i = σ(w_base∘ỹ + w_lora∘l̃_i + w_cross∘ỹ∘l̃_i + β).

    A (experts·r, in) and B (out, experts·r) are the LoRAs' factors stacked, each one's scale in its B; ỹ and l̃_i are y
    and l_i after layer norms. What the gates hold (out,) is a layer's own and the same for all its LoRAs, so that it
    does for any number of them in any order. A gate depends on the token, and on the timestep of a diffusion model as
    far as y and l_i do: on nothing else. The mean of a gate over its channels (…, experts) is emitted as ``"router"``.

    Attributes:
        r: rank of each LoRA.
        experts: their number.
        base: gates see the layer's output by itself (w_base); the released models' do not.
        cross: gates see the product with it (w_cross).
    """

    r: int = 8
    experts: int = 2
    base: bool = True
    cross: bool = True

    name: ClassVar[str] = "autolora"
    paper: ClassVar[str] = "AutoLoRA: Automatic LoRA Retrieval and Fine-Grained Gated Fusion, arXiv 2508.02107"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.LINEAR})
    emits: ClassVar[tuple[str, ...]] = ("router",)

    @property
    def routes(self) -> int:
        return self.experts

    def output_scale(self, p: Params) -> Tensor:
        return p.weight_out

    def params(self, site: Site) -> dict[str, ParamSpec]:
        ranks, out = self.experts * self.r, (site.out_features,)
        normal = ParamSpec(out, _inits.normal(1.0))
        specs = expert_specs(site, ranks, Role.FROZEN)
        specs |= {"weight_base": normal} if self.base else {}
        specs |= {"weight_lora": normal}
        specs |= {"weight_cross": normal} if self.cross else {}
        specs |= {"bias": normal, "weight_out": ParamSpec(out, _constant_init(0.512))}
        for norm in ("norm_base", "norm_lora") if self.base or self.cross else ("norm_lora",):
            specs |= {
                f"{norm}_weight": ParamSpec(out, _constant_init(1.0), decay=False),
                f"{norm}_bias": ParamSpec(out, _inits.zeros, decay=False),
            }
        return specs

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        # One LoRA after the other: stacked, what the layer answers would lie in memory once for each.
        hidden = F.linear(x, p.lora_A).split(self.r, -1)
        ups = p.lora_B.split(self.r, -1)
        seen = _layer_norm(y, p.norm_base_weight, p.norm_base_bias) if self.base or self.cross else y
        added, opened = torch.zeros_like(y), []
        for h, up in zip(hidden, ups, strict=True):
            one = F.linear(h, up)
            gate = torch.sigmoid(self._heard(seen, _layer_norm(one, p.norm_lora_weight, p.norm_lora_bias), p))
            added = added + gate * one
            opened.append(gate.mean(-1))
        ctx.emit("router", torch.stack(opened, -1))
        return y + self.output_scale(p) * added

    def _heard(self, seen: Tensor, one: Tensor, p: Params) -> Tensor:
        """What a gate is the sigmoid of, from the layer's output and a LoRA's after their norms."""
        found = p.weight_lora * one + p.bias
        if self.base:
            found = found + p.weight_base * seen
        return found + p.weight_cross * seen * one if self.cross else found

    @staticmethod
    def from_loras(
        adapters: Sequence[Adapter],
        *,
        base: bool = True,
        cross: bool = True,
        name: str = "autolora",
        seed: int = 0,
        gates: Mapping[str, Tensor] | None = None,
    ) -> Adapter:
        """One gated adapter of several LoRAs; the gates start fresh, or are those of a trained merger.

        Each LoRA's scale is folded into its B, smaller ranks are padded with zeros (both exact), and a site that only
        some of them adapt gets zeros for the others, which add nothing.

        Args:
            adapters: plain LoRAs.
            base, cross: as the variant's.
            name: the new adapter's name.
            seed: of the gates.
            gates: the tensors of the authors' merger, by key (``model_dict.<path, ___ for its dots>.weight_lora``, …).
                Which of ``base`` and ``cross`` it has, they tell.

        Raises:
            AdapterError: no LoRA, or one that is more than its two factors on linear layers.
            AdapterError: two were made for different models, or a gate is as wide as no layer.
            FormatError: the merger has a tensor that is no gate's, or a layer that no LoRA adapts.
            FormatError: it lacks one of a layer that a LoRA adapts.
        """
        merger = None if gates is None else _merger_gates(gates)
        if merger is not None:
            held = {key for own in merger.values() for key in own}
            base, cross = "weight_base" in held, "weight_cross" in held

        def make(paths: tuple[str, ...], rank: int, number: int) -> AutoLoRA:
            return AutoLoRA(targets=paths, r=rank, experts=number, base=base, cross=cross)

        adapter = from_loras(adapters, "AutoLoRA", make, name=name, seed=seed)
        return adapter if merger is None else _set_gates(adapter, merger)


_MERGER, _DOT = "model_dict.", "___"
"""What keys of the authors' merger begin with, and what stands there for the dots of a layer's path."""


def _merger_gates(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Path of a layer -> its gate's tensors, as a merger of the authors' holds them.

    Raises:
        FormatError: a tensor is no gate's.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, dot, name = key.removeprefix(_MERGER).partition(".")
        if not key.startswith(_MERGER) or not dot or not name.startswith(_OF_GATE):
            raise FormatError(
                f"'{key}' is no tensor of a gate of AutoLoRA's",
                next_step=f"a merger holds {_MERGER}<path of a layer, {_DOT} for its dots>.<{', '.join(_OF_GATE)}>",
                code="unused_tensors",
            )
        found.setdefault(layer.replace(_DOT, "."), {})[name.replace(".", "_")] = tensor
    return found


_OF_GATE = ("weight_base", "weight_lora", "weight_cross", "weight_out", "bias", "norm_base.", "norm_lora.")


def _set_gates(adapter: Adapter, merger: Mapping[str, Mapping[str, Tensor]]) -> Adapter:
    """The adapter with the gates of a merger, which has one for each of its layers and no other."""
    strange = next((path for path in merger if path not in adapter.tensors), None)
    if strange is not None:
        raise FormatError(
            f"the merger has a gate for '{strange}', which none of the LoRAs adapts",
            nearest=nearest_name(strange, adapter.tensors),
            next_step="give the LoRAs that it was trained for, or leave out the gates of other layers",
            code="unused_tensors",
        )
    for path, own in adapter.tensors.items():
        own.update(_check_gate(path, own, merger.get(path, {})))
    return adapter


def _check_gate(path: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One layer's gate of a merger, as large as its own."""
    wanted = own.keys() - {"lora_A", "lora_B"}
    if given.keys() != wanted:
        lacking, more = sorted(wanted - given.keys()), sorted(given.keys() - wanted)
        raise FormatError(
            f"the merger's gate for '{path}' "
            + (f"lacks '{lacking[0]}'" if lacking else f"has '{more[0]}', which those of other layers lack"),
            next_step="give all of one trained merger",
            code="corrupt_file",
        )
    for key, tensor in given.items():
        if tensor.shape != own[key].shape:
            raise AdapterError(
                f"'{key}' of the merger's gate for '{path}' is {tuple(tensor.shape)}, and the layer gives "
                f"{tuple(own[key].shape)}",
                next_step="give a merger of the same base model",
                code="shape_mismatch",
            )
    return {key: tensor.to(own[key].dtype) for key, tensor in given.items()}


def _layer_norm(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(value, value.shape[-1:], weight, bias, eps=1e-5)


def _constant_init(number: float) -> Init:
    def init(context: InitContext) -> Tensor:
        return torch.full(context.shape, number)

    return init
