"""Arguments of ``lorac.compile`` that are no plain text, as the command line spells them: reserve, dynamic shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.export import Dim

from lorac.errors import OptionError, nearest_name
from lorac.ir.host.inputs.example_inputs import by_name, default_inputs, default_shapes
from lorac.ir.host.patterns import KEYWORDS
from lorac.ir.slots.planning import Reserve
from lorac.kinds import kinds_of

RESERVE_HELP = (
    "Room for adapters that are added later, as rank=64, targets=q_proj,v_proj, adapters=8, scales=yes or weights=yes; "
    "may be given several times."
)
DYNAMIC_HELP = (
    "INPUT=AXES: which axes of an input may vary, as input_ids=0,1, or input_ids= for none; may be given several times."
)
_SWITCH = {"yes": True, "no": False}


def names_of(targets: str) -> str | tuple[str, ...]:
    """Targets as text: a keyword, or names with commas between them."""
    return targets if targets in KEYWORDS else tuple(filter(None, targets.split(",")))


def reserve_of(specs: Sequence[str]) -> Reserve | None:
    """The room that ``--reserve`` asks for; None where it is not given.

    Raises:
        OptionError: a name or value that a reserve does not have.
    """
    told = {}
    for name, value in (_pair("--reserve", spec, RESERVE_HELP) for spec in specs):
        kinds = kinds_of(Reserve)
        if name not in kinds:
            raise OptionError(
                f"--reserve has no '{name}'", nearest=nearest_name(name, kinds), next_step=f"it has {', '.join(kinds)}"
            )
        told[name] = _value(name, value, kinds[name])
    return Reserve(**told) if told else None


def _value(name: str, text: str, kind: Any) -> Any:
    """What a reserve's field is to be."""
    if kind is int and text.isdecimal():
        return int(text)
    if kind is bool and text in _SWITCH:
        return _SWITCH[text]
    if kind in (int, bool):
        step = "give a whole number" if kind is int else "give yes or no"
        raise OptionError(f"--reserve takes no {name}={text}", next_step=step)
    return names_of(text)


def shapes_of(specs: Sequence[str], model: nn.Module, example_inputs: Any) -> dict[str, Any] | None:
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
    inputs = by_name(model, default_inputs(model) if example_inputs is None else example_inputs)
    shapes = default_shapes(model, inputs, named=False)
    for name, axes in (_pair("--dynamic", spec, DYNAMIC_HELP) for spec in specs):
        if name not in inputs:
            raise OptionError(
                f"--dynamic names '{name}', which is no input",
                nearest=nearest_name(name, inputs),
                next_step=f"the inputs are {', '.join(inputs)}",
            )
        shapes[name] = {_axis(name, axis, inputs[name].dim()): Dim.AUTO for axis in filter(None, axes.split(","))}
    return shapes


def _axis(name: str, text: str, count: int) -> int:
    if not text.isdecimal() or int(text) >= count:
        raise OptionError(f"'{name}' has no axis '{text}'", next_step=f"its axes are 0 to {count - 1}")
    return int(text)


def _pair(option: str, spec: str, told: str) -> tuple[str, str]:
    name, separator, value = spec.partition("=")
    if not separator:
        raise OptionError(f"{option} takes no '{spec}'", next_step=told)
    return name, value
