"""Structured arguments of ``lorac.compile`` on the command line: targets, reserve, dynamic shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin

from lorac.argument_types import Fields, broken_limit, field_types
from lorac.errors import OptionError, not_one_of
from lorac.runtime.generation.tokenizers import find_inner_tokenizer

if TYPE_CHECKING:
    from torch import nn

    from lorac.ir.slots.required_slots import Reserve

RESERVE_HELP = (
    "Room for adapters that are added later, as rank=64, targets=q_proj,v_proj, adapters=8, scales=yes, weights=yes or "
    "outputs=classifier:77; may be given several times."
)
DYNAMIC_HELP = (
    "INPUT=AXES: which axes of an input may vary, as input_ids=0,1, or input_ids= for none; may be given several times."
)
_CALIBRATION_TOKENS = 256
"""The number of tokens that a model reads at once for its calibration."""
T = TypeVar("T")
_BOOLEANS = {"yes": True, "no": False}


def parse_targets(targets: str) -> str | tuple[str, ...]:
    """Return targets given as a keyword, or as names separated by commas."""
    from lorac.ir.sites.patterns import TARGET_KEYWORDS

    return targets if targets in TARGET_KEYWORDS else tuple(filter(None, targets.split(",")))


def parse_reserve(specs: Sequence[str]) -> Reserve | None:
    """Return the reserve given by ``--reserve``, or None; raises as ``parse_record``."""
    from lorac.ir.slots.required_slots import Reserve

    return parse_record("--reserve", Reserve, specs, RESERVE_HELP)


def parse_record(option: str, record: Callable[..., T], specs: Sequence[str], usage: str) -> T | None:
    """Make a dataclass from an option's texts, each FIELD=VALUE; return None without texts.

    Raises:
        OptionError: there is no such field, or it does not take the value.
    """
    found: dict[str, Any] = {}
    for name, value in (_split_pair(option, spec, usage) for spec in specs):
        types = field_types(record)
        if name not in types:
            raise not_one_of(f"{option} has no field", name, types)
        fault = f"{option} takes no {name}={value}"
        parsed = _parse_value(fault, value, types[name])
        if (limit := broken_limit(record, name, parsed, found)) is not None:  # type: ignore[arg-type]  # a class
            raise OptionError(fault, next_step=f"it takes {limit.describe(found)}")
        found[name] = found.get(name, {}) | parsed if isinstance(parsed, dict) else parsed
    return record(**found) if found else None


def _parse_value(fault: str, text: str, kind: object) -> float | str | tuple[str, ...] | dict[str, int]:
    if get_origin(kind) is Mapping:
        sizes = [one.rpartition(":") for one in text.split(",")]
        if not all(name and size.isdecimal() for name, _, size in sizes):
            raise OptionError(fault, next_step="give NAME:NUMBER, such as classifier:77, or several with commas")
        return {name: int(size) for name, _, size in sizes}
    if kind in (int, float) and text.isdecimal():
        return int(text)
    if kind is bool and text in _BOOLEANS:
        return _BOOLEANS[text]
    if kind in (int, float, bool):
        raise OptionError(fault, next_step="give yes or no" if kind is bool else "give a whole number")
    return parse_targets(text)


def parse_dynamic_shapes(
    specs: Sequence[str], model: nn.Module, example_inputs: Fields | None
) -> dict[str, Any] | None:
    """Return the ``dynamic_shapes`` given by ``--dynamic``, or None.

    Args:
        specs: texts INPUT=AXES; inputs that are not named have their default axes.
        example_inputs: as in ``lorac.compile``.

    Raises:
        OptionError: an input or an axis does not exist.
    """
    if not specs:
        return None
    from torch.export import Dim

    from lorac.frontend.host import Host
    from lorac.frontend.inputs.dynamic_shapes import make_dynamic_shapes

    host = Host.of(model)
    inputs = host.bind(example_inputs)
    shapes = make_dynamic_shapes(host, inputs, named=False)
    for name, axes in (_split_pair("--dynamic", spec, DYNAMIC_HELP) for spec in specs):
        if name not in inputs:
            raise not_one_of("--dynamic: the model has no input", name, inputs)
        shapes[name] = {_parse_axis(name, axis, inputs[name].dim()): Dim.AUTO for axis in filter(None, axes.split(","))}
    return shapes


def _parse_axis(name: str, text: str, count: int) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise OptionError(f"'{name}' has no axis '{text}'", next_step=f"give an axis from 0 to {count - 1}")
    return int(text)


def read_calibration(path: Path, tokenizer: object) -> list[dict[str, object]]:
    """Return calls of a model for its calibration: the tokens of a text file, in parts of some hundred.

    Raises:
        OptionError: the file has no text, or the model no tokenizer.
    """
    tokenizer = find_inner_tokenizer(tokenizer)
    if not callable(tokenizer):
        raise OptionError(
            f"--calibration: the model has no tokenizer to read '{path}'",
            next_step="save its tokenizer in its folder, or give token ids from Python: calibration=",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--calibration: '{path}' cannot be read: {error}", next_step="give a text file") from error
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise OptionError(f"--calibration: '{path}' has no text", next_step="give some pages of text")
    return [{"input_ids": part} for part in ids.split(_CALIBRATION_TOKENS, dim=1)]


def _split_pair(option: str, spec: str, usage: str) -> tuple[str, str]:
    name, separator, value = spec.partition("=")
    if not separator:
        raise OptionError(f"{option} takes no '{spec}'", next_step=usage)
    return name, value
