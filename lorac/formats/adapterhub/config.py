"""adapter_config.json as AdapterHub writes it: ``{"config": {fields of BnConfig}, "model_type": …, "name": …, …}``.

Source: adapters.configuration.BnConfig of adapters 1.3.0. Its fields are ``lorac.Bottleneck``'s by the same names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorac.errors import CorruptFile, UnknownField, UnsupportedField, nearest_name, short
from lorac.ir.host.sublayers import Stream, Sublayer
from lorac.kinds import fits, kinds_of, spelled
from lorac.variants._bottlenecks import PRESETS
from lorac.variants.bottleneck import Bottleneck

WHOLE = {"name", "model_type"}
"""Fields around the configuration that decide what a file means; ``config`` is one, too."""
_IRRELEVANT = {"hidden_size", "model_name", "model_class", "version", "config_id", "type"}
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
_ARCHITECTURE = "architecture"
VERSION = "adapters.1.3.0"


@dataclasses.dataclass(frozen=True)
class Read:
    """A configuration as it was read.

    Attributes:
        name: what the keys of its tensors call the adapter.
        model_type: of the model it was trained on.
        variant: the method, without its places.
        reductions: number of a block -> its own reduction_factor.
        undone: whether an invertible adapter was undone in front of the head: the library's own classes do it.
    """

    name: str
    model_type: Any
    variant: Bottleneck
    reductions: Mapping[str, float]
    undone: bool


def read_config(raw: Mapping[str, Any], file: Path, *, invertible: bool) -> Read:
    """What a file says.

    Args:
        raw: its content.
        file: for messages.
        invertible: whether the tensors beside it have an invertible adapter's.

    Raises:
        UnknownField: a field that the library does not have.
        UnsupportedField: another method, or a value that lorac does not build.
        CorruptFile: a field is missing.
    """
    _refuse_unknown(raw, {*WHOLE, *_IRRELEVANT, "config"}, file)
    given = raw.get("config")
    if isinstance(given, str):
        given = _preset(given, file)
    if not isinstance(given, dict) or not isinstance(raw.get("name"), str):
        raise CorruptFile(f"'{file}' has no {'name' if isinstance(given, dict) else 'config'}")
    fields = _modern(given, raw)
    if fields.get(_ARCHITECTURE) is not None:
        raise UnsupportedField(
            f"'{file}' is of the architecture {short(fields[_ARCHITECTURE])}; of AdapterHub's lorac reads bottlenecks",
            next_step="train it with PEFT, whose LoRA and (IA)^3 files lorac reads",
        )
    _refuse_unknown(fields, {*FIELDS, *TRAINING, _ARCHITECTURE}, file)
    if raw.get("type") == "text_task" and not invertible:
        fields["inv_adapter"] = None  # task adapters of the first versions name one that they do not have
    reductions = fields["reduction_factor"] if isinstance(fields.get("reduction_factor"), dict) else {}
    if reductions:
        fields["reduction_factor"] = reductions.get("default", next(iter(reductions.values())))
    chosen = {name: value for name, value in fields.items() if name in FIELDS and value is not None}
    for name, value in {**chosen, **{f"reduction_factor of {n}": r for n, r in reductions.items()}}.items():
        _check_value(name, value, file)
    variant = Bottleneck(**chosen)
    undone = str(raw.get("model_class", "")).endswith("AdapterModel")
    own = {number: float(value) for number, value in reductions.items() if number != "default"}
    return Read(raw["name"], raw.get("model_type"), variant, own, undone)


def _preset(name: str, file: Path) -> dict[str, Any]:
    """A configuration that is told by its name alone."""
    plain = name.removesuffix("+inv")
    modern = _OLD.get(plain, plain) + ("_inv" if plain != name else "")
    if modern not in PRESETS:
        raise UnsupportedField(
            f"'{file}' names the configuration {name!r}",
            nearest=nearest_name(modern, PRESETS),
            next_step=f"lorac knows {', '.join(PRESETS)}",
        )
    return dict(PRESETS[modern])


def _modern(given: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
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
        fields["non_linearity"] = _ACTIVATIONS.get(act, act) if "version" not in raw else act
    return fields


def _refuse_unknown(fields: Mapping[str, Any], known: set[str], file: Path) -> None:
    for name in fields:
        if name not in known:
            raise UnknownField(
                f"'{file}' sets the unknown field '{name}' = {short(fields[name])}",
                nearest=nearest_name(name, known),
                next_step="it may change the result, so it is not ignored; "
                "if it is from a newer library, a newer lorac may know it",
            )


def _check_value(name: str, value: Any, file: Path) -> None:
    kind = kinds_of(Bottleneck)[name.partition(" ")[0]]
    positive = value > 0 if "reduction_factor" in name and isinstance(value, int | float) else True
    if not fits(value, kind) or not positive:
        raise UnsupportedField(
            f"'{file}' sets {name}={short(value)}", next_step=f"it takes {spelled(kind)}, above 0 where it divides"
        )
    if name == "inv_adapter" and value != "nice":
        raise UnsupportedField(
            f"'{file}' sets inv_adapter={short(value)}, which lorac does not build; the library cannot run it",
            next_step='train with inv_adapter="nice"',
        )


def with_reductions(read: Read, stream: Stream, sublayers: Mapping[str, Sublayer]) -> Bottleneck:
    """The method with reduction factors of single blocks as patterns of the sites in them."""
    numbers = {block: str(number) for number, block in enumerate(stream.blocks)}
    pattern = {
        re.escape(path): read.reductions[numbers[found.block]]
        for path, found in sublayers.items()
        if numbers[found.block] in read.reductions
    }
    return dataclasses.replace(read.variant, reduction_pattern=pattern)


def written(variant: Bottleneck, reductions: Mapping[str, float], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a method.

    Args:
        variant: the method.
        reductions: number of a block -> reduction factor, where they differ.
        chosen: the fields that say where it sits.
    """
    fields = {**{name: getattr(variant, name) for name in sorted(FIELDS)}, **chosen, **TRAINING}
    if reductions:
        fields["reduction_factor"] = {**reductions, "default": variant.reduction_factor}
    if isinstance(fields["scaling"], int):
        fields["scaling"] = float(fields["scaling"])  # the library takes no whole number
    if variant.inv_adapter is None:
        fields["inv_adapter_reduction_factor"] = None
    return fields | {"leave_out": list(fields["leave_out"])}
