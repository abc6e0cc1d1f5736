"""Arguments of ``lorac.compile`` that are no plain text, as the command line spells them: reserve, dynamic shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.export import Dim

from lorac.argument_types import field_types
from lorac.errors import OptionError, nearest_name
from lorac.frontend.call_binding import bind_by_name
from lorac.frontend.dynamic_shapes import make_dynamic_shapes
from lorac.frontend.example_inputs import make_example_inputs
from lorac.ir.patterns import TARGET_KEYWORDS
from lorac.ir.slots.planning import Reserve

RESERVE_HELP = (
    "Room for adapters that are added later, as rank=64, targets=q_proj,v_proj, adapters=8, scales=yes or weights=yes; "
    "may be given several times."
)
DYNAMIC_HELP = (
    "INPUT=AXES: which axes of an input may vary, as input_ids=0,1, or input_ids= for none; may be given several times."
)
_BOOLEANS = {"yes": True, "no": False}


def parse_targets(targets: str) -> str | tuple[str, ...]:
    """Targets as text: a keyword, or names with commas between them."""
    return targets if targets in TARGET_KEYWORDS else tuple(filter(None, targets.split(",")))


def parse_reserve(specs: Sequence[str]) -> Reserve | None:
    """The room that ``--reserve`` asks for; None where it is not given.

    Raises:
        OptionError: a name or value that a reserve does not have.
    """
    told = {}
    for name, value in (_split_pair("--reserve", spec, RESERVE_HELP) for spec in specs):
        kinds = field_types(Reserve)
        if name not in kinds:
            raise OptionError(
                f"--reserve has no '{name}'", nearest=nearest_name(name, kinds), next_step=f"it has {', '.join(kinds)}"
            )
        told[name] = _parse_reserve_value(name, value, kinds[name])
    return Reserve(**told) if told else None


def _parse_reserve_value(name: str, text: str, kind: Any) -> Any:
    """What a reserve's field is to be."""
    if kind is int and text.isdecimal():
        return int(text)
    if kind is bool and text in _BOOLEANS:
        return _BOOLEANS[text]
    if kind in (int, bool):
        step = "give a whole number" if kind is int else "give yes or no"
        raise OptionError(f"--reserve takes no {name}={text}", next_step=step)
    return parse_targets(text)


def parse_dynamic_shapes(specs: Sequence[str], model: nn.Module, example_inputs: Any) -> dict[str, Any] | None:
    """The ``dynamic_shapes`` that ``--dynamic`` asks for; None where it is not given.

    Args:
        specs: what was given.
        model: what they are the inputs of; inputs that are not named vary as they do without this.
        example_inputs: as ``lorac.compile`` takes them, or None.

    Raises:
        OptionError: an input or an axis that there is not.
    """
    if not specs:
        return None
    inputs = bind_by_name(model, make_example_inputs(model) if example_inputs is None else example_inputs)
    shapes = make_dynamic_shapes(model, inputs, named=False)
    for name, axes in (_split_pair("--dynamic", spec, DYNAMIC_HELP) for spec in specs):
        if name not in inputs:
            raise OptionError(
                f"--dynamic names '{name}', which is no input",
                nearest=nearest_name(name, inputs),
                next_step=f"the inputs are {', '.join(inputs)}",
            )
        shapes[name] = {_parse_axis(name, axis, inputs[name].dim()): Dim.AUTO for axis in filter(None, axes.split(","))}
    return shapes


def _parse_axis(name: str, text: str, count: int) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise OptionError(f"'{name}' has no axis '{text}'", next_step=f"its axes are 0 to {count - 1}")
    return int(text)


def _split_pair(option: str, spec: str, told: str) -> tuple[str, str]:
    name, separator, value = spec.partition("=")
    if not separator:
        raise OptionError(f"{option} takes no '{spec}'", next_step=told)
    return name, value
