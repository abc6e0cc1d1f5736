"""AutoLoRA's gated fusion: several LoRAs in every layer, each with a gate per channel.

"AutoLoRA: Automatic LoRA Retrieval and Fine-Grained Gated Fusion for Text-to-Image Generation", Li et al. 2025, arXiv
2508.02107. (Another method of that name searches ranks.) Only the gates are trained. The released code has variants
with some of the terms each; the variant with all terms is combined from these.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from lorac.argument_types import Count
from lorac.errors import FormatError, nearest_name, shape_error, unused_error
from lorac.variants._mixtures import LoraMixture, RoutedVariant
from lorac.variants.adapter import Adapter
from lorac.variants.base import Context, Params, ParamSpec, Role, Site, Tensor
from lorac.variants.initialisers import constant, normal, ones, zeros
from lorac.variants.low_rank import factor_specs


@dataclass(frozen=True, kw_only=True)
class AutoLoRA(LoraMixture, RoutedVariant):
    """``y' = y + Σ_i w_out∘g_i∘l_i``, l_i = B_i·A_i·x, g_i = σ(w_base∘ỹ + w_lora∘l̃_i + w_cross∘ỹ∘l̃_i + β).

    A (experts·r, in) and B (out, experts·r) are the LoRAs' stacked factors; each LoRA's scale is in its B; ỹ and l̃_i
    are y and l_i after layer norms. The gates' vectors (out,) belong to a layer and apply to all its LoRAs, in any
    number and order. A gate depends only on y and l_i, and so on the token and a diffusion model's timestep. The mean
    of a gate over its channels (…, experts) is emitted as ``"router"``.

    Attributes:
        r: rank of each LoRA.
        experts: number of LoRAs.
        base: whether gates read the layer's output (w_base); the released models' gates do not.
        cross: whether gates read the product of the layer's and the LoRA's output (w_cross).
    """

    r: Count = 8
    experts: Count = 2
    base: bool = True
    cross: bool = True

    name = "autolora"
    paper = "AutoLoRA: Automatic LoRA Retrieval and Fine-Grained Gated Fusion, arXiv 2508.02107"

    def output_scale(self, p: Params) -> Tensor:
        return p.weight_out

    def params(self, site: Site) -> dict[str, ParamSpec]:
        out = (site.out_features,)
        gate = ParamSpec(out, normal(1.0))
        specs = factor_specs(site, self.experts * self.r, Role.FROZEN)
        specs |= {"weight_base": gate} if self.base else {}
        specs |= {"weight_lora": gate}
        specs |= {"weight_cross": gate} if self.cross else {}
        specs |= {"bias": gate, "weight_out": ParamSpec(out, constant(0.512))}
        for norm in ("norm_base", "norm_lora") if self.base or self.cross else ("norm_lora",):
            specs |= {
                f"{norm}_weight": ParamSpec(out, ones, decay=False),
                f"{norm}_bias": ParamSpec(out, zeros, decay=False),
            }
        return specs

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        # One LoRA at a time: stacked outputs of all LoRAs would need more memory.
        hidden = F.linear(x, p.lora_A).split(self.r, -1)
        ups = p.lora_B.split(self.r, -1)
        base = _layer_norm(y, p.norm_base_weight, p.norm_base_bias) if self.base or self.cross else y
        total, openings = torch.zeros_like(y), []
        for h, up in zip(hidden, ups, strict=True):
            output = F.linear(h, up)
            normed = _layer_norm(output, p.norm_lora_weight, p.norm_lora_bias)
            logits = p.weight_lora * normed + p.bias
            logits = logits + p.weight_base * base if self.base else logits
            logits = logits + p.weight_cross * base * normed if self.cross else logits
            gate = torch.sigmoid(logits)
            total = total + gate * output
            openings.append(gate.mean(-1))
        ctx.emit("router", torch.stack(openings, -1))
        return y + self.output_scale(p) * total

    @classmethod
    def from_loras(  # type: ignore[override]  # no field is called gates
        cls, adapters: Sequence[Adapter], *, gates: Mapping[str, Tensor] | None = None, **settings: Any
    ) -> Adapter:
        """Make one gated adapter from several LoRAs, with fresh gates or the gates of a trained merger.

        Args:
            gates: the tensors of the authors' merger, by key (``model_dict.<path, ___ for its dots>.weight_lora``, …).
                They decide ``base`` and ``cross``. Other arguments are as in ``LoraMixture``.

        Raises:
            AdapterError: as in ``LoraMixture``; or a gate's width does not fit its layer.
            FormatError: the merger has a tensor that belongs to no gate, has a layer that no LoRA adapts, or lacks the
                gate of a layer that a LoRA adapts.
        """
        merger = None if gates is None else _merger_gates(gates)
        if merger is not None:
            keys = {key for gate in merger.values() for key in gate}
            base, cross = "weight_base" in keys, "weight_cross" in keys
            if not base and not cross:  # the authors' gates have this norm even then
                merger = {
                    path: {key: tensor for key, tensor in gate.items() if not key.startswith("norm_base_")}
                    for path, gate in merger.items()
                }
            settings |= {"base": base, "cross": cross}
        adapter = super().from_loras(adapters, **settings)
        return adapter if merger is None else _set_gates(adapter, merger)


_MERGER, _DOT = "model_dict.", "___"
"""Prefix of the keys of the authors' merger, and its replacement for the dots of a layer's path."""


def _merger_gates(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the gates of the authors' merger: path of a layer -> the tensors of the layer's gate."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, dot, name = key.removeprefix(_MERGER).partition(".")
        if not key.startswith(_MERGER) or not dot or not name.startswith(_GATE_TENSORS):
            raise unused_error(
                f"'{key}' is not a tensor of an AutoLoRA gate",
                next_step=f"its keys are {_MERGER}<path of a layer, {_DOT} for its dots>.<{', '.join(_GATE_TENSORS)}>",
            )
        found.setdefault(layer.replace(_DOT, "."), {})[name.replace(".", "_")] = tensor
    return found


_GATE_TENSORS = ("weight_base", "weight_lora", "weight_cross", "weight_out", "bias", "norm_base.", "norm_lora.")


def _set_gates(adapter: Adapter, merger: Mapping[str, Mapping[str, Tensor]]) -> Adapter:
    """Copy a merger's gates into an adapter; the merger must have one gate for each layer, and no other."""
    unknown = next((path for path in merger if path not in adapter.tensors), None)
    if unknown is not None:
        raise unused_error(
            f"the merger has a gate for '{unknown}', which none of the LoRAs adapts",
            nearest=nearest_name(unknown, adapter.tensors),
            next_step="give the LoRAs that the merger was trained for, or leave out the gates of other layers",
        )
    for path, own in adapter.tensors.items():
        given, expected = merger.get(path, {}), own.keys() - {"lora_A", "lora_B"}
        if given.keys() != expected:
            missing, extra = sorted(expected - given.keys()), sorted(given.keys() - expected)
            raise FormatError(
                f"the merger's gate for '{path}' "
                + (f"lacks '{missing[0]}'" if missing else f"has '{extra[0]}', which other layers' gates lack"),
                next_step="give all tensors of one trained merger",
                code="corrupt_file",
            )
        for key, tensor in given.items():
            if tensor.shape != own[key].shape:
                raise shape_error(
                    f"'{key}' of the merger's gate for '{path}' is {tuple(tensor.shape)}, and the layer's is "
                    f"{tuple(own[key].shape)}",
                    next_step="give a merger of the same base model",
                )
            own[key] = tensor.to(own[key].dtype)
    return adapter


def _layer_norm(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(value, value.shape[-1:], weight, bias, eps=1e-5)
