"""The sizes that a program's inputs may have, and what must hold between them.

A trace holds for the sizes that it met and for all others that take the same way through the model. What "the same way"
means comes out of it as conditions. They are kept as text in Python's notation, ``mask[1] == ids[1]``, over the sizes
of inputs, whole numbers and a few operators: readable in a message, and nothing that a stored program could abuse.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lorac.errors import ArtifactError, InputMismatch

Axis = tuple[str, int]
"""An input of a program, and one of its axes."""
AxisSizes = Mapping[Axis, int]
"""A size for each axis that varies."""
_LONGEST = 20_000
"""Characters of a condition: far more than any model needs, and few enough to read one in no time."""
_READABLE = 80
"""Characters of a condition in a message."""
_STEPS = 64
"""How far from an example's size another one is looked for."""
_PROBES = 8
"""How many sizes are tried at most to find out whether what was assumed is needed."""
_REMEMBERED = 1024
"""Shapes of calls that were found right, and need not be looked at again."""


@dataclass(frozen=True)
class SizeConstraints:
    """The sizes that a program's inputs may have.

    Attributes:
        shapes: input -> its size on each axis; None where that varies.
        conditions: what the sizes that vary must meet.
        assumed: what torch takes for granted while it traces, that no size is 0 or 1 for instance, and what need not
            hold for the program to be right (``settled``).
        fixed: the axes that were to vary and that the trace fixed.
        lines: of those axes, the line of the model that fixed it, as far as that is known.
    """

    shapes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    fixed: tuple[Axis, ...] = ()
    lines: Mapping[Axis, str] = field(default_factory=dict)
    _right: set[object] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def telling(self) -> tuple[str, ...]:
        """The conditions worth telling, the shortest first: not that sizes are equal, nor that no input is empty."""
        least = {f"{name}[{axis}] >= 1" for name, axis in self._axes()}
        told = (text for text in self.conditions if text not in least and _joined(text) is None)
        return tuple(sorted(told, key=len))

    def of(self, inputs: Mapping[str, Any]) -> dict[Axis, int]:
        """The sizes of inputs along the axes that vary."""
        shapes = {name: np.shape(inputs[name]) for name in self.shapes}
        return {(name, axis): shapes[name][axis] for name, axis in self._axes()}

    def refuse(self, inputs: Mapping[str, Any]) -> None:
        """Refuse inputs of sizes that the program was not captured for.

        Raises:
            InputMismatch: naming the input, the axis and what is admitted there.
        """
        shapes = tuple(np.shape(inputs[name]) for name in self.shapes)
        if shapes in self._right:
            return
        for (name, wanted), shape in zip(self.shapes.items(), shapes, strict=True):
            self._refuse_shape(name, shape, wanted)
        chosen = self.of(inputs)
        for condition in self.conditions:
            if not _holds(condition, chosen):
                raise _unmet(condition, chosen)
        if len(self._right) >= _REMEMBERED:
            self._right.clear()
        self._right.add(shapes)

    def admits(self, chosen: AxisSizes) -> bool:
        """Whether sizes meet all conditions, the assumed ones too."""
        return all(_holds(condition, chosen) for condition in (*self.conditions, *self.assumed))

    def settled(self, right: Sequence[AxisSizes]) -> SizeConstraints:
        """What was assumed becomes a condition, unless the program is right at sizes where it does not hold."""
        needed = [text for text in self.assumed if all(_holds(text, chosen) for chosen in right)]
        return replace(self, conditions=tuple(dict.fromkeys((*self.conditions, *needed))), assumed=())

    def by_row(self, name: str, rows: Axis) -> SizeConstraints:
        """The same for an input that comes to have a row of its former kind for each of another input's."""
        conditions = [text.replace(f"{name}[0]", f"{name}[1]") for text in self.conditions]
        assumed = [text.replace(f"{name}[0]", f"{name}[1]") for text in self.assumed]
        return replace(
            self,
            shapes={**self.shapes, name: (None, *self.shapes[name])},
            conditions=(*conditions, f"{name}[0] == {rows[0]}[{rows[1]}]"),
            assumed=tuple(assumed),
        )

    def without(self, axes: Collection[Axis]) -> SizeConstraints:
        """The same, where of some axes nobody needs to know that they were to vary."""
        lines = {axis: line for axis, line in self.lines.items() if axis not in axes}
        return replace(self, fixed=tuple(axis for axis in self.fixed if axis not in axes), lines=lines)

    # --- sizes to try --------------------------------------------------------------------------------------------

    def others(self, chosen: AxisSizes) -> dict[Axis, int] | None:
        """Admitted sizes that differ from these along as many axes as possible, and are near; None: there are none.

        Args:
            chosen: an example's.
        """
        for change in _CHANGES:
            if self.admits(tried := {axis: change(size) for axis, size in chosen.items()}) and chosen:
                return tried
        found = dict(chosen)
        for group in self._together(chosen):
            tries = (found | {axis: change(found[axis]) for axis in group} for change in _CHANGES)
            found = next((tried for tried in tries if self.admits(tried)), found)
        return None if found == chosen else found

    def least(self, chosen: AxisSizes) -> list[dict[Axis, int]]:
        """The smallest sizes that meet the conditions and break something assumed: alone, and all of them together.

        Args:
            chosen: sizes for the axes that are not at their smallest.
        """
        groups = self._together(chosen)
        alone = [self._lowered(chosen, group) for group in groups]
        together = {axis: lowered[axis] for group, lowered in zip(groups, alone, strict=True) for axis in group}
        found = [*alone, together] if together != chosen else list(self._shrunk(chosen))
        return [
            tried
            for i, tried in enumerate(found)
            if tried not in found[:i] and self._meets(tried) and not self.admits(tried)
        ]

    def doubtful(self, chosen: AxisSizes) -> list[dict[Axis, int]]:
        """Sizes that meet the conditions, and each break something assumed that no other of them does: ``least`` first.

        Args:
            chosen: sizes near which they are to be.
        """
        found = self.least(chosen)
        near = [tried for tried in self._near(chosen) if self._meets(tried)] if self.assumed else []
        for text in self.assumed:
            if all(_holds(text, tried) for tried in found) and len(found) < _PROBES:
                found += [tried for tried in near if not _holds(text, tried)][:1]
        return found

    def _near(self, chosen: AxisSizes) -> Iterator[dict[Axis, int]]:
        """Sizes that differ along the axes of one group."""
        groups = self._together(chosen)
        return (
            dict(chosen) | {axis: change(chosen[axis]) for axis in group} for group in groups for change in _CHANGES
        )

    def _lowered(self, chosen: AxisSizes, group: Collection[Axis]) -> dict[Axis, int]:
        """The smallest size along some axes that meets the conditions, or the sizes as they are."""
        most = min(chosen[axis] for axis in group)
        tries = (dict(chosen) | dict.fromkeys(group, size) for size in range(1, most))
        return next(filter(self._meets, tries), dict(chosen))

    def _shrunk(self, chosen: AxisSizes) -> Iterator[dict[Axis, int]]:
        """All sizes made smaller in step, by one number or by one factor: for where none can be on its own."""
        most = min(chosen.values(), default=1)
        by_number = ({axis: size - step for axis, size in chosen.items()} for step in range(most - 1, 0, -1))
        by_factor = ({axis: size * least // most for axis, size in chosen.items()} for least in range(1, most))
        yield from filter(None, (next(filter(self._meets, tries), None) for tries in (by_number, by_factor)))

    def _meets(self, chosen: AxisSizes) -> bool:
        return all(_holds(condition, chosen) for condition in self.conditions)

    def _together(self, chosen: AxisSizes) -> list[list[Axis]]:
        """Axes that are changed together: they must be equal, or are equal and in the same place, as batches are."""
        group = {axis: {axis} for axis in chosen}
        alike = [(a, b) for a in chosen for b in chosen if a[1] == b[1] and chosen[a] == chosen[b]]
        for a, b in [*filter(None, map(_joined, self.conditions)), *alike]:
            if group[a] is not group[b]:
                group[a] |= group[b]
                group.update(dict.fromkeys(group[b], group[a]))
        return [sorted(axes) for i, axes in enumerate(group.values()) if axes not in list(group.values())[:i]]

    def _axes(self) -> list[Axis]:
        return [(name, axis) for name, shape in self.shapes.items() for axis, size in enumerate(shape) if size is None]

    # --- errors --------------------------------------------------------------------------------------------------

    def _refuse_shape(self, name: str, shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> None:
        if len(shape) == len(wanted):
            wrong = [axis for axis, size in enumerate(wanted) if size is not None and size != shape[axis]]
        if len(shape) != len(wanted) or (wrong and (name, wrong[0]) not in self.fixed):
            sizes = ", ".join("any" if size is None else str(size) for size in wanted)
            step = "dynamic_shapes= when compiling says which sizes may vary"
            raise InputMismatch(
                f"input '{name}' has shape {list(shape)}; the program was captured for [{sizes}]",
                next_step=step
                if len(shape) == len(wanted)
                else f"give it with {len(wanted)} axes: a batch of one is one too",
            )
        for axis in wrong:
            line = self.lines.get((name, axis))
            raise InputMismatch(
                f"input '{name}' has size {shape[axis]} on axis {axis}; the trace of the model fixed {wanted[axis]}"
                + (f", at {line}" if line else ""),
                next_step=f"compile with example_inputs= of size {shape[axis]} there; target='eager' takes any size",
            )

    # --- how it is stored ----------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The sizes as JSON."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        # A library's line without where that is installed: others read it elsewhere.
        lines = {axis: line.rpartition("site-packages/")[2] for axis, line in self.lines.items()}
        fixed = [[name, axis, lines.get((name, axis))] for name, axis in self.fixed]
        return {"shapes": shapes, "conditions": list(self.conditions), "fixed": fixed}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> SizeConstraints:
        """The inverse of ``to_json``, of what was settled.

        Raises:
            ArtifactError: a condition that is none.
        """
        shapes = {name: tuple(shape) for name, shape in stored["shapes"].items()}
        lines = {(name, axis): None if line is None else str(line) for name, axis, line in stored["fixed"]}
        known = {axis: line for axis, line in lines.items() if line is not None}
        sizes = cls(shapes, tuple(stored["conditions"]), fixed=tuple(lines), lines=known)
        varying = set(sizes._axes())
        for text in sizes.conditions:
            if (axes := find_axes(text)) is None or not axes <= varying:
                raise ArtifactError(f"the program's sizes are to meet '{text[:80]}', which is no condition on them")
        return sizes


_CHANGES: tuple[Callable[[int], int], ...] = (
    *(functools.partial(operator.add, step) for step in range(1, _STEPS + 1)),
    functools.partial(operator.mul, 2),
    functools.partial(operator.mul, 3),
)
"""Ways from a size to another one, the nearest first."""


def flatten_argument(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What an argument holds in dicts, lists and tuples, by the names that torch gives to inputs: joined by ``_``."""
    held = value.items() if isinstance(value, Mapping) else enumerate(value) if type(value) in {list, tuple} else None
    if held is None:
        yield name, value
        return
    for key, inner in held:
        yield from flatten_argument(inner, f"{name}_{key}".strip("_").lower())


def describe_axes(axes: Collection[Axis]) -> str:
    """Axes in words, those of one number together: ``axis 1 of 'ids' and 'mask'``."""
    numbers = dict.fromkeys(axis for _, axis in axes)
    return ", ".join(f"axis {n} of {' and '.join(repr(name) for name, axis in axes if axis == n)}" for n in numbers)


def _unmet(condition: str, chosen: AxisSizes) -> InputMismatch:
    """The error for sizes that do not meet a condition."""
    axes = sorted(find_axes(condition) or ())
    found = " and ".join(f"size {chosen[name, axis]} on axis {axis} of '{name}'" for name, axis in axes)
    if _joined(condition) is not None:
        return InputMismatch(f"the model joins inputs that differ: {found}", next_step="give both the same size")
    return InputMismatch(
        f"the program was not captured for {found}: it needs {shorten_condition(condition)}",
        next_step="compile with example_inputs= of the sizes that are needed; target='eager' takes any",
    )


def shorten_condition(condition: str) -> str:
    """A condition as far as a line has room for it."""
    return condition if len(condition) <= _READABLE else f"{condition[:_READABLE]} …"


# ── Conditions ───────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, eq=False)
class _Condition:
    """A condition that was read: the axes it speaks of, the pair of them that it wants equal, and what it says."""

    axes: frozenset[Axis]
    joined: tuple[Axis, Axis] | None
    value: Callable[[AxisSizes], int]


def find_axes(text: str) -> frozenset[Axis] | None:
    """The axes that a condition speaks of; None where the text is no condition."""
    read = _read(text)
    return None if read is None else read.axes


def _holds(text: str, chosen: AxisSizes) -> bool:
    """Whether sizes meet a condition; one that cannot be computed for them, by a division by 0, is not met."""
    read = _read(text)
    assert read is not None
    try:
        return bool(read.value(chosen))
    except ZeroDivisionError:
        return False


def _joined(text: str) -> tuple[Axis, Axis] | None:
    """The two axes that a condition wants equal; None where it says something else."""
    read = _read(text)
    return None if read is None else read.joined


@functools.lru_cache(maxsize=8192)
def _read(text: str) -> _Condition | None:
    """A condition out of its text; None where that holds anything but sizes, whole numbers and known operators."""
    try:
        if len(text) > _LONGEST:
            return None
        tree = ast.parse(text, mode="eval").body
        axes = frozenset(_axis(node) for node in ast.walk(tree) if isinstance(node, ast.Subscript))
        value = _value(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    joined = None
    if isinstance(tree, ast.Compare) and isinstance(tree.ops[0], ast.Eq):
        left, right = tree.left, tree.comparators[0]
        if isinstance(left, ast.Subscript) and isinstance(right, ast.Subscript):
            joined = (_axis(left), _axis(right))
    return _Condition(axes, joined, value)


_BINARY: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_MANY: dict[str, Callable[[Sequence[int]], int]] = {"min": min, "max": max}
_LOGIC: dict[type, Callable[[Iterator[int]], bool]] = {ast.And: all, ast.Or: any}
_UNARY: dict[type, Callable[[int], int]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}


def _value(node: ast.expr) -> Callable[[AxisSizes], int]:
    """What computes a part of a condition from sizes.

    Raises:
        ValueError: it is none of the parts that conditions have.
    """
    match node:
        case ast.Constant(value=int(number)):
            return lambda chosen: number
        case ast.Subscript():
            return operator.itemgetter(_axis(node))
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            return _both(_known(_BINARY, type(op)), _value(left), _value(right))
        case ast.UnaryOp(op=op, operand=operand):
            return _one(_known(_UNARY, type(op)), _value(operand))
        case ast.BoolOp(op=op, values=values):
            logic, parts = _known(_LOGIC, type(op)), [_value(part) for part in values]
            return lambda chosen: logic(part(chosen) for part in parts)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if args:
            pick, operands = _known(_MANY, name), [_value(part) for part in args]
            return lambda chosen: pick([part(chosen) for part in operands])
    raise ValueError(f"a condition on sizes has no {type(node).__name__}")


def _both(op: Callable[[int, int], int], a: Callable[[AxisSizes], int], b: Callable[[AxisSizes], int]) -> Any:
    return lambda chosen: op(a(chosen), b(chosen))


def _one(op: Callable[[int], int], a: Callable[[AxisSizes], int]) -> Any:
    return lambda chosen: op(a(chosen))


def _known(table: Mapping[Any, Any], key: object) -> Any:
    if key not in table:
        raise ValueError(f"a condition on sizes has no {key}")
    return table[key]


def _axis(node: ast.Subscript) -> Axis:
    match node:
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(axis))):
            return name, axis
    raise ValueError("a condition on sizes speaks of something else")
