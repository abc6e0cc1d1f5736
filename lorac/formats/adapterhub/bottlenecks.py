"""Bottleneck adapters: ``BnConfig``, whose fields are ``lorac.Bottleneck``'s by the same names.

Source: adapters.configuration.BnConfig of adapters 1.3.0.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorac.argument_types import field_types, format_type, matches_type
from lorac.errors import FormatError, nearest_name, short
from lorac.formats.adapterhub import layouts
from lorac.formats.adapterhub.components import (
    ComponentFile,
    ConfigHeader,
    ModelLayout,
    PlacedComponent,
    refuse_unknown,
)
from lorac.formats.adapterhub.keys import KeyPattern
from lorac.variants._bottleneck_layers import PRESETS
from lorac.variants.adapter import Adapter
from lorac.variants.bottleneck import Bottleneck

Tensor = torch.Tensor
TRAINING: Mapping[str, Any] = {"init_weights_seed": None, "hypercomplex_nonlinearity": "glorot-uniform"}
"""Of the configuration: how tensors started, which their values have outlived. With the library's defaults."""
_SAME = (
    "mh_adapter output_adapter cross_adapter leave_out reduction_factor non_linearity scaling is_parallel "
    "original_ln_before original_ln_after residual_before_ln ln_before ln_after adapter_residual_before_ln use_gating "
    "dropout stochastic_depth init_weights phm_layer phm_dim phm_rank phm_bias factorized_phm_W shared_W_phm "
    "shared_phm_rule factorized_phm_rule learn_phm phm_c_init phm_init_range inv_adapter inv_adapter_reduction_factor"
)
FIELDS = frozenset(_SAME.split())
"""Fields that the method has by the same name; all are applied, those about starts and dropout in training."""
_OLD = {"pfeiffer": "seq_bn", "houlsby": "double_seq_bn", "parallel": "par_bn", "scaled_parallel": "scaled_par_bn"}
_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""What files without a version mean by these."""


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class BottleneckComponent:
    """A configuration as it was read.

    Attributes:
        variant: the method, without its places.
        reductions: number of a block -> its own reduction_factor.
        undone: whether an invertible adapter is undone in front of the head: the library's own classes do it.
    """

    variant: Bottleneck
    reductions: Mapping[str, float]
    undone: bool

    def placed(self, host: ModelLayout, name: str) -> PlacedComponent:
        """The bottlenecks of an adapter at a model's sublayers.

        Raises:
            SiteError: as ``Bottleneck.placed``.
        """
        variant = self._with_reductions(host).for_stream(host.view, host.stream)
        if not self.undone:  # transformers' own classes run under the library without the inverse
            targets = tuple(path for path in variant.targets if path not in variant.heads)
            variant = dataclasses.replace(variant, heads=(), targets=targets)
        return PlacedComponent((variant,), places_of(variant, host), lambda _, stored: dict(stored))

    def _with_reductions(self, host: ModelLayout) -> Bottleneck:
        """Reduction factors of single blocks as patterns of the sites in them."""
        numbers = {block: str(number) for number, block in enumerate(host.stream.blocks)}
        pattern = {
            re.escape(path): self.reductions[numbers[found.block]]
            for path, found in host.sublayers.items()
            if numbers[found.block] in self.reductions
        }
        return dataclasses.replace(self.variant, reduction_pattern=pattern)


def read(given: Mapping[str, Any], told: ConfigHeader) -> BottleneckComponent:
    """A configuration.

    Raises:
        FormatError: a field that the library does not have.
        FormatError: a value that lorac does not build.
    """
    fields = _modern(given, told)
    refuse_unknown(fields, {*FIELDS, *TRAINING}, told.file)
    if told.task:
        fields["inv_adapter"] = None  # task adapters of the first versions name one that they do not have
    reductions = fields["reduction_factor"] if isinstance(fields.get("reduction_factor"), dict) else {}
    if reductions:
        fields["reduction_factor"] = reductions.get("default", next(iter(reductions.values())))
    chosen = {name: value for name, value in fields.items() if name in FIELDS and value is not None}
    for name, value in {**chosen, **{f"reduction_factor of {n}": r for n, r in reductions.items()}}.items():
        _check_value(name, value, told.file)
    own = {number: float(value) for number, value in reductions.items() if number != "default"}
    return BottleneckComponent(Bottleneck(**chosen), own, told.own_class)


def preset(name: str, file: Path) -> dict[str, Any]:
    """A configuration that is told by its name alone.

    Raises:
        FormatError: there is none of that name.
    """
    plain = name.removesuffix("+inv")
    modern = _OLD.get(plain, plain) + ("_inv" if plain != name else "")
    if modern not in PRESETS:
        raise FormatError(
            f"'{file}' names the configuration {name!r}",
            nearest=nearest_name(modern, PRESETS),
            next_step=f"lorac knows {', '.join(PRESETS)}",
            code="unsupported_field",
        )
    return dict(PRESETS[modern])


def _modern(given: Mapping[str, Any], told: ConfigHeader) -> dict[str, Any]:
    """The fields as versions of today call them."""
    fields = dict(given)
    nested = fields.pop("invertible_adapter", None)
    if isinstance(nested, dict):
        fields |= {
            "inv_adapter": nested.get("block_type"),
            "inv_adapter_reduction_factor": nested.get("reduction_factor"),
        }
    act = fields.get("non_linearity")
    if isinstance(act, str):
        act = act.lower()
        fields["non_linearity"] = act if told.versioned else _ACTIVATIONS.get(act, act)
    return fields


def _check_value(name: str, value: Any, file: Path) -> None:
    kind = field_types(Bottleneck)[name.partition(" ")[0]]
    positive = value > 0 if "reduction_factor" in name and isinstance(value, int | float) else True
    if not matches_type(value, kind) or not positive:
        raise FormatError(
            f"'{file}' sets {name}={short(value)}",
            next_step=f"it takes {format_type(kind)}, above 0 where it divides",
            code="unsupported_field",
        )
    if name == "inv_adapter" and value != "nice":
        raise FormatError(
            f"'{file}' sets inv_adapter={short(value)}, which lorac does not build; the library cannot run it",
            next_step='train with inv_adapter="nice"',
            code="unsupported_field",
        )


def places_of(variant: Bottleneck, host: ModelLayout) -> tuple[KeyPattern, ...]:
    """Where the tensors of bottlenecks lie in a file."""
    own, common = layouts.leaves(variant), layouts.shared_leaves(variant)
    here = {path: place for path, place in host.sublayer_places.items() if path in variant.targets}
    places = [KeyPattern(layouts.PLACED, place, own, (path,)) for path, place in here.items()]
    if common:
        places.append(KeyPattern(layouts.SHARED, "", common, tuple(here)))
    ends = (*variant.embeddings, *variant.heads)
    if ends:
        places.append(KeyPattern(layouts.INVERTIBLE, "", layouts.COUPLING, ends))
    return tuple(places)


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def written(adapter: Adapter, variant: Bottleneck, host: ModelLayout) -> ComponentFile:
    """Bottlenecks of an adapter as the library has them.

    Args:
        adapter: with the tensors of these alone.
        variant: its method.
        host: the model.

    Raises:
        FormatError: no fields place bottlenecks so, or one computes with other residuals than the model's.
    """
    chosen, reductions = _chosen(adapter, variant, host)
    fields = {**{name: getattr(variant, name) for name in sorted(FIELDS)}, **chosen, **TRAINING}
    if reductions:
        fields["reduction_factor"] = {**reductions, "default": variant.reduction_factor}
    if isinstance(fields["scaling"], int):
        fields["scaling"] = float(fields["scaling"])  # the library takes no whole number
    if variant.inv_adapter is None:
        fields["inv_adapter_reduction_factor"] = None
    fields["leave_out"] = list(fields["leave_out"])
    held = dataclasses.replace(variant, targets=tuple(adapter.tensors))
    return ComponentFile(fields, places_of(held, host), adapter.tensors, own_class=bool(variant.heads))


def _chosen(adapter: Adapter, variant: Bottleneck, host: ModelLayout) -> tuple[dict[str, Any], dict[str, float]]:
    """The fields that make the library place bottlenecks where the adapter's are, and blocks' own reduction factors."""
    stream, sublayers = host.stream, host.sublayers
    ends = {*variant.embeddings, *variant.heads}
    paths = adapter.tensors.keys() - ends
    kinds = {sublayers[path].kind for path in paths & sublayers.keys()}
    numbers = {block: number for number, block in enumerate(stream.blocks)}
    filled = {sublayers[path].block for path in paths & sublayers.keys()}
    able = {found.block for found in sublayers.values() if found.kind in kinds}
    fields: dict[str, Any] = {
        "mh_adapter": "attention" in kinds,
        "output_adapter": "mlp" in kinds,
        "cross_adapter": "cross" in kinds,
        "leave_out": tuple(sorted(numbers[block] for block in able - filled)),
    }
    asked = dataclasses.replace(
        variant, targets=(), exclude=(), layers=(), residuals={}, inner={}, embeddings=(), heads=(), **fields
    ).for_stream(host.view, stream)
    same = all(getattr(asked, name) == getattr(variant, name) for name in ("residuals", "inner", "norm_eps"))
    places = {*asked.targets} - {*asked.embeddings, *asked.heads}
    if places != paths or not same or asked.embeddings != variant.embeddings:
        raise FormatError(
            f"AdapterHub puts bottlenecks at all attentions, all MLPs or both of a block, and adapter '{adapter.name}' "
            "sits, or reads, elsewhere",
            next_step="use format='native'",
            code="unsupported_field",
        )
    return fields, _reductions(adapter, variant, {path: numbers[sublayers[path].block] for path in paths})


def _reductions(adapter: Adapter, variant: Bottleneck, numbers: Mapping[str, int]) -> dict[str, float]:
    found: dict[str, float] = {}
    for path, number in numbers.items():
        own = variant.at_path(path).reduction_factor  # type: ignore[attr-defined]  # a bottleneck's
        if found.setdefault(str(number), own) != own:
            raise FormatError(
                f"AdapterHub has one reduction_factor a block, and adapter '{adapter.name}' has two in block {number}",
                next_step="use format='native'",
                code="unsupported_field",
            )
    return {number: own for number, own in found.items() if own != variant.reduction_factor}
