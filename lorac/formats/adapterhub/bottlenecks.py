"""Bottleneck adapters: ``BnConfig``, whose fields have the same names as those of ``lorac.Bottleneck``.

Source: adapters.configuration.BnConfig of adapters 1.3.0.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorac.argument_types import Fields, JsonMapping
from lorac.errors import nearest_name, short
from lorac.formats._config_fields import check_field_type, refuse_unknown_fields
from lorac.formats._errors import unsupported_error
from lorac.formats.adapterhub.components import (
    ComponentConfig,
    ComponentFile,
    ConfigHeader,
    ModelLayout,
    PlacedComponent,
)
from lorac.formats.adapterhub.keys import KeyPattern
from lorac.formats.adapterhub.layouts import ADAPTERS, COUPLING, INVERTIBLE, SHARED, bottleneck_leaves, shared_leaves
from lorac.variants._bottleneck_layers import PRESETS
from lorac.variants.adapter import Adapter
from lorac.variants.bottleneck import Bottleneck

TRAINING: JsonMapping = {"init_weights_seed": None, "hypercomplex_nonlinearity": "glorot-uniform"}
"""Fields about the initialisation of tensors, which their values have outlived, with the library's defaults."""
_FIELDS = (
    "mh_adapter output_adapter cross_adapter leave_out reduction_factor non_linearity scaling is_parallel "
    "original_ln_before original_ln_after residual_before_ln ln_before ln_after adapter_residual_before_ln use_gating "
    "dropout stochastic_depth init_weights phm_layer phm_dim phm_rank phm_bias factorized_phm_W shared_W_phm "
    "shared_phm_rule factorized_phm_rule learn_phm phm_c_init phm_init_range inv_adapter inv_adapter_reduction_factor"
)
FIELDS = frozenset(_FIELDS.split())
"""Fields that the method has by the same name; all are applied, those about initialisation and dropout in training."""
_OLD_NAMES = {
    "pfeiffer": "seq_bn",
    "houlsby": "double_seq_bn",
    "parallel": "par_bn",
    "scaled_parallel": "scaled_par_bn",
}
_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Activations in files without a version -> today's names."""


def read_bottlenecks(config: JsonMapping, header: ConfigHeader) -> ComponentConfig:
    """Parse a configuration of bottlenecks.

    Raises:
        FormatError: the library lacks a field, or lorac does not support its value.
    """
    fields: dict[str, Any] = dict(config)
    nested, activation = fields.pop("invertible_adapter", None), fields.get("non_linearity")
    if isinstance(nested, dict):  # of early versions
        fields["inv_adapter"] = nested.get("block_type")
        fields["inv_adapter_reduction_factor"] = nested.get("reduction_factor")
    if isinstance(activation, str):
        activation = activation.lower()
        fields["non_linearity"] = activation if header.versioned else _ACTIVATIONS.get(activation, activation)
    refuse_unknown_fields(fields, (*FIELDS, *TRAINING), header.file)
    if header.task:
        fields["inv_adapter"] = None  # early task adapters name an invertible adapter that they do not have
    by_block = fields["reduction_factor"] if isinstance(fields.get("reduction_factor"), dict) else {}
    if by_block:
        fields["reduction_factor"] = by_block.get("default", next(iter(by_block.values())))
    given = {name: value for name, value in fields.items() if name in FIELDS and value is not None}
    for name, value in given.items():
        _check_value(name, value, header.file)
    for value in by_block.values():
        _check_value("reduction_factor", value, header.file)
    reductions = {number: float(value) for number, value in by_block.items() if number != "default"}
    method = Bottleneck(**given)

    def place(layout: ModelLayout, name: str) -> PlacedComponent:
        numbers = {block: str(number) for number, block in enumerate(layout.stream.blocks)}
        blocks = {path: numbers[sublayer.block] for path, sublayer in layout.sublayers.items()}
        pattern = {re.escape(path): reductions[block] for path, block in blocks.items() if block in reductions}
        unplaced = dataclasses.replace(method, reduction_pattern=pattern)
        # Under the library, transformers' own classes omit the inverse of an invertible adapter.
        variant = unplaced.for_stream(layout.view, layout.stream, inverts=header.own_class)
        return PlacedComponent((variant,), _key_patterns(variant, layout), lambda _, stored: dict(stored))

    return place


def read_preset(name: str, file: Path) -> dict[str, object]:
    """Return a configuration that a file gives only by its name.

    Raises:
        FormatError: lorac does not know the name.
    """
    plain = name.removesuffix("+inv")
    modern = _OLD_NAMES.get(plain, plain) + ("_inv" if plain != name else "")
    if modern not in PRESETS:
        raise unsupported_error(
            f"'{file}' names the configuration {name!r}",
            nearest=nearest_name(modern, PRESETS),
            next_step=f"lorac knows {', '.join(PRESETS)}",
        )
    return dict(PRESETS[modern])


def _check_value(name: str, value: object, file: Path) -> None:
    check_field_type(Bottleneck, name, value, file)
    if name == "inv_adapter" and value != "nice":
        raise unsupported_error(
            f"'{file}' sets inv_adapter={short(value)}, which lorac does not build; the library cannot run it",
            next_step='train with inv_adapter="nice"',
        )


def _key_patterns(variant: Bottleneck, layout: ModelLayout) -> tuple[KeyPattern, ...]:
    """Return the key patterns of a file's bottlenecks."""
    leaves, shared = bottleneck_leaves(variant), shared_leaves(variant)
    names = {path: name for path, name in layout.sublayer_names.items() if path in variant.targets}
    patterns = [KeyPattern(ADAPTERS, name, leaves, (path,)) for path, name in names.items()]
    if shared:
        patterns.append(KeyPattern(SHARED, "", shared, tuple(names)))
    ends = (*variant.embeddings, *variant.heads)
    if ends:
        patterns.append(KeyPattern(INVERTIBLE, layout.embedder, COUPLING, ends))
    return tuple(patterns)


def write_bottlenecks(adapter: Adapter, variant: Bottleneck, layout: ModelLayout) -> ComponentFile:
    """Convert the bottlenecks of an adapter to a component of a file.

    Args:
        adapter: an adapter that has only the tensors of bottlenecks.

    Raises:
        FormatError: no configuration places bottlenecks at these sites, or a bottleneck adds other residuals than the
            model's.
    """
    numbers = {block: number for number, block in enumerate(layout.stream.blocks)}
    fields = {
        **{name: getattr(variant, name) for name in sorted(FIELDS)},
        **_placing_fields(adapter, variant, layout, numbers),
        **TRAINING,
    }
    blocks = {path: numbers[sublayer.block] for path, sublayer in layout.sublayers.items() if path in adapter.tensors}
    reductions: dict[str, float] = {}  # by the number of a block
    for path, number in blocks.items():
        at_path = variant.at_path(path)
        assert isinstance(at_path, Bottleneck)
        if reductions.setdefault(str(number), at_path.reduction_factor) != at_path.reduction_factor:
            raise unsupported_error(
                f"AdapterHub has one reduction_factor a block, and adapter '{adapter.name}' has two in block {number}"
            )
    others = {number: factor for number, factor in reductions.items() if factor != variant.reduction_factor}
    if others:
        fields["reduction_factor"] = {**others, "default": variant.reduction_factor}
    if isinstance(fields["scaling"], int):
        fields["scaling"] = float(fields["scaling"])  # the library accepts no int
    if variant.inv_adapter is None:
        fields["inv_adapter_reduction_factor"] = None
    fields["leave_out"] = list(fields["leave_out"])
    targeted = dataclasses.replace(variant, targets=tuple(adapter.tensors))
    return ComponentFile(fields, _key_patterns(targeted, layout), adapter.tensors, own_class=bool(variant.heads))


def _placing_fields(adapter: Adapter, variant: Bottleneck, layout: ModelLayout, numbers: Mapping[str, int]) -> Fields:
    """Return the fields that make the library place bottlenecks at exactly the adapter's sites."""
    paths = adapter.tensors.keys() - {*variant.embeddings, *variant.heads}
    sublayers = [layout.sublayers[path] for path in paths & layout.sublayers.keys()]
    kinds, used = {sublayer.kind for sublayer in sublayers}, {sublayer.block for sublayer in sublayers}
    possible = {sublayer.block for sublayer in layout.sublayers.values() if sublayer.kind in kinds}
    fields: dict[str, Any] = {
        "mh_adapter": "attention" in kinds,
        "output_adapter": "mlp" in kinds,
        "cross_adapter": "cross" in kinds,
        "leave_out": tuple(sorted(numbers[block] for block in possible - used)),
    }
    unplaced = dataclasses.replace(
        variant, targets=(), exclude=(), layers=(), residuals={}, inner={}, embeddings=(), heads=(), **fields
    )
    placed = unplaced.for_stream(layout.view, layout.stream, inverts=bool(variant.heads))
    same = all(getattr(placed, name) == getattr(variant, name) for name in ("residuals", "inner", "norm_eps"))
    targets = {*placed.targets} - {*placed.embeddings, *placed.heads}
    if targets != paths or not same or placed.embeddings != variant.embeddings:
        raise unsupported_error(
            f"AdapterHub puts bottlenecks at all attentions, all MLPs or both of a block, and adapter "
            f"'{adapter.name}' acts, or reads, elsewhere"
        )
    return fields
