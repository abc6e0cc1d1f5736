"""The sizes that a program's inputs may have, and the conditions between them.

A trace is valid for the sizes that it saw, and for all sizes that take the same path through the model. The trace
yields conditions, stored as text of axes, integers and a few operators. Such text is readable in a message, and a
stored program cannot abuse it.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lorac.argument_types import Fields, JsonMapping
from lorac.errors import ArtifactError, InputMismatch

Axis = tuple[str, int]
"""An input of a program, and the index of one of its axes."""
AxisSizes = Mapping[Axis, int]
"""A size for each axis that varies."""
_MAX_CONDITION = 20_000
"""Most characters of a condition: far more than any model needs, and few enough to parse quickly."""
_SHOWN = 80
"""Most characters of a condition in a message."""
_MAX_STEP = 64
"""The largest distance from an example's size at which another size is tried."""
_MAX_PROBES = 8
"""The most sizes that are tried to decide whether an assumption is needed."""
_MAX_CHECKED = 1024
"""Most shapes of accepted calls in the cache, which are not checked again."""


@dataclass(frozen=True)
class SizeConstraints:
    """The sizes that a program's inputs may have.

    Attributes:
        shapes: input -> its size on each axis; None where the size varies.
        conditions: conditions on the sizes that vary.
        assumed: conditions that torch assumes while it traces, such as sizes other than 0 and 1. The program may be
            correct without them (``resolve_assumptions``).
        fixed: axes that were requested to vary, and that the trace fixed.
        lines: fixed axis -> the line of the model that fixed it, where it is known.
    """

    shapes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    fixed: tuple[Axis, ...] = ()
    lines: Mapping[Axis, str] = field(default_factory=dict)
    _accepted: set[object] = field(default_factory=set, init=False, repr=False, compare=False)

    @property
    def notable(self) -> tuple[str, ...]:
        """The conditions to show, shortest first; equal sizes and non-empty inputs are left out."""
        non_empty = {f"{name}[{axis}] >= 1" for name, axis in self._varying()}
        shown = (text for text in self.conditions if text not in non_empty and _parse(text).equal is None)
        return tuple(sorted(shown, key=len))

    def list_fixed(self) -> tuple[tuple[str, int, int, str | None], ...]:
        """Return input, axis, size and the model's line for each requested axis that the trace fixed."""
        return tuple(
            (name, axis, self.shapes[name][axis] or 0, self.lines.get((name, axis))) for name, axis in self.fixed
        )

    def measure(self, inputs: Fields) -> dict[Axis, int]:
        """Return the sizes of inputs along the axes that vary."""
        shapes = {name: np.shape(inputs[name]) for name in self.shapes}
        return {(name, axis): shapes[name][axis] for name, axis in self._varying()}

    def check(self, inputs: Fields) -> None:
        """Refuse inputs with sizes that the program was not captured for.

        Raises:
            InputMismatch: a size is not admitted; the error names the input, the axis and the sizes that are.
        """
        shapes = tuple(np.shape(inputs[name]) for name in self.shapes)
        if shapes in self._accepted:
            return
        for (name, expected), shape in zip(self.shapes.items(), shapes, strict=True):
            self._check_shape(name, shape, expected)
        sizes = self.measure(inputs)
        for condition in self.conditions:
            if _holds(condition, sizes):
                continue
            axes = sorted(find_axes(condition) or ())
            found = " and ".join(f"size {sizes[name, axis]} on axis {axis} of '{name}'" for name, axis in axes)
            if _parse(condition).equal is not None:
                raise InputMismatch(f"the model joins inputs that differ: {found}", next_step="give both the same size")
            raise InputMismatch(
                f"the program was not captured for {found}: it needs {shorten_condition(condition)}",
                next_step="compile with example_inputs= of the sizes that are needed; target='eager' takes any",
            )
        if len(self._accepted) >= _MAX_CHECKED:
            self._accepted.clear()
        self._accepted.add(shapes)

    def admits(self, sizes: AxisSizes) -> bool:
        """Whether sizes meet all conditions and all assumptions."""
        return all(_holds(condition, sizes) for condition in (*self.conditions, *self.assumed))

    def resolve_assumptions(self, right: Sequence[AxisSizes]) -> SizeConstraints:
        """Return a copy whose assumptions became conditions, except assumptions that sizes in ``right`` disprove."""
        needed = [text for text in self.assumed if all(_holds(text, sizes) for sizes in right)]
        return replace(self, conditions=tuple(dict.fromkeys((*self.conditions, *needed))), assumed=())

    def with_rows(self, name: str, rows: Axis) -> SizeConstraints:
        """Return a copy in which an input has a new first axis, with the size of another input's axis."""
        conditions = [text.replace(f"{name}[0]", f"{name}[1]") for text in self.conditions]
        assumed = [text.replace(f"{name}[0]", f"{name}[1]") for text in self.assumed]
        return replace(
            self,
            shapes={**self.shapes, name: (None, *self.shapes[name])},
            conditions=(*conditions, f"{name}[0] == {rows[0]}[{rows[1]}]"),
            assumed=tuple(assumed),
        )

    def forget_fixed(self, axes: Collection[Axis]) -> SizeConstraints:
        """Return a copy that does not list these axes as fixed."""
        lines = {axis: line for axis, line in self.lines.items() if axis not in axes}
        return replace(self, fixed=tuple(axis for axis in self.fixed if axis not in axes), lines=lines)

    def restrict(self, inputs: Collection[str]) -> SizeConstraints:
        """Return the constraints that mention only these inputs."""

        def select(texts: Sequence[str]) -> tuple[str, ...]:
            return tuple(text for text in texts if {name for name, _ in find_axes(text) or ()} <= set(inputs))

        return replace(
            self,
            shapes={name: shape for name, shape in self.shapes.items() if name in inputs},
            conditions=select(self.conditions),
            assumed=select(self.assumed),
            fixed=tuple(axis for axis in self.fixed if axis[0] in inputs),
            lines={axis: line for axis, line in self.lines.items() if axis[0] in inputs},
        )

    def find_other(self, sizes: AxisSizes) -> dict[Axis, int] | None:
        """Return admitted sizes near an example's, with as many axes changed as possible; None if there are none.

        Each group of axes changes separately and as little as possible, since the model runs at these sizes: if all
        axes changed in step, a side that grows by eights would make the batch grow by eight. Where conditions tie
        groups together, all axes change in step.
        """
        apart = dict(sizes)
        for group in self._group_axes(sizes):
            tries = (apart | {axis: change(apart[axis]) for axis in group} for change in _CHANGES)
            apart = next((tried for tried in tries if self.admits(tried)), apart)
        alike = ({axis: change(size) for axis, size in sizes.items()} for change in _CHANGES)
        together = next((tried for tried in alike if self.admits(tried)), dict(sizes))
        found = max(apart, together, key=lambda tried: sum(tried[axis] != size for axis, size in sizes.items()))
        return None if found == sizes else found

    def find_smallest(self, sizes: AxisSizes) -> list[dict[Axis, int]]:
        """Return the smallest sizes that meet the conditions and break an assumption.

        Each group of axes is minimised separately, then all groups together.

        Args:
            sizes: the sizes of the axes that do not change.
        """
        found, together = [], dict(sizes)
        for group in self._group_axes(sizes):
            most = min(sizes[axis] for axis in group)
            tries = (dict(sizes) | dict.fromkeys(group, size) for size in range(1, most))
            lowered = next(filter(self._meets_conditions, tries), dict(sizes))
            together |= {axis: lowered[axis] for axis in group}
            found.append(lowered)
        found.append(together)
        if together == sizes:  # axes cannot change separately: reduce all by one difference or one factor
            most = min(sizes.values(), default=1)
            by_difference = ({axis: size - step for axis, size in sizes.items()} for step in range(most - 1, 0, -1))
            by_factor = ({axis: size * least // most for axis, size in sizes.items()} for least in range(1, most))
            firsts = (next(filter(self._meets_conditions, tries), None) for tries in (by_difference, by_factor))
            found = [tried for tried in firsts if tried is not None]
        return [
            tried
            for i, tried in enumerate(found)
            if tried not in found[:i] and self._meets_conditions(tried) and not self.admits(tried)
        ]

    def find_doubtful(self, sizes: AxisSizes) -> list[dict[Axis, int]]:
        """Return sizes that meet the conditions and break an assumption each; ``find_smallest``'s come first.

        Args:
            sizes: the sizes near which other sizes are tried.
        """
        found = self.find_smallest(sizes)
        groups = self._group_axes(sizes) if self.assumed else []
        tries = (dict(sizes) | {axis: change(sizes[axis]) for axis in group} for group in groups for change in _CHANGES)
        near = [tried for tried in tries if self._meets_conditions(tried)]
        for text in self.assumed:
            if all(_holds(text, tried) for tried in found) and len(found) < _MAX_PROBES:
                found += [tried for tried in near if not _holds(text, tried)][:1]
        return found

    def _meets_conditions(self, sizes: AxisSizes) -> bool:
        return all(_holds(condition, sizes) for condition in self.conditions)

    def _group_axes(self, sizes: AxisSizes) -> list[list[Axis]]:
        """Group axes that change together: axes that must be equal, and equal axes of one index, such as batches."""
        group = {axis: {axis} for axis in sizes}
        alike = [(a, b) for a in sizes for b in sizes if a[1] == b[1] and sizes[a] == sizes[b]]
        for a, b in [*filter(None, (_parse(text).equal for text in self.conditions)), *alike]:
            if group[a] is not group[b]:
                group[a] |= group[b]
                group.update(dict.fromkeys(group[b], group[a]))
        return [sorted(axes) for i, axes in enumerate(group.values()) if axes not in list(group.values())[:i]]

    def _varying(self) -> list[Axis]:
        return [(name, axis) for name, shape in self.shapes.items() for axis, size in enumerate(shape) if size is None]

    def _check_shape(self, name: str, shape: tuple[int, ...], expected: tuple[int | None, ...]) -> None:
        if len(shape) == len(expected):
            wrong = [axis for axis, size in enumerate(expected) if size is not None and size != shape[axis]]
        if len(shape) != len(expected) or (wrong and (name, wrong[0]) not in self.fixed):
            sizes = ", ".join("any" if size is None else str(size) for size in expected)
            step = "dynamic_shapes= when compiling says which sizes may vary"
            raise InputMismatch(
                f"input '{name}' has shape {list(shape)}; the program was captured for [{sizes}]",
                next_step=step
                if len(shape) == len(expected)
                else f"give it with {len(expected)} axes: a batch of one is one too",
            )
        for axis in wrong:
            line = self.lines.get((name, axis))
            raise InputMismatch(
                f"input '{name}' has size {shape[axis]} on axis {axis}; the trace of the model fixed {expected[axis]}"
                + (f", at {line}" if line else ""),
                next_step=f"compile with example_inputs= of size {shape[axis]} there; target='eager' takes any size",
            )

    def to_json(self) -> dict[str, object]:
        """Return the constraints as JSON."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        # Store a library's line without the folder, which differs between machines.
        lines = {axis: line.rpartition("site-packages/")[2] for axis, line in self.lines.items()}
        fixed = [[name, axis, lines.get((name, axis))] for name, axis in self.fixed]
        return {"shapes": shapes, "conditions": list(self.conditions), "fixed": fixed}

    @classmethod
    def from_json(cls, stored: JsonMapping) -> SizeConstraints:
        """Read constraints that ``to_json`` wrote; assumptions are not stored.

        Raises:
            ArtifactError: a stored text is not a condition on the sizes that vary.
        """
        shapes = {name: tuple(shape) for name, shape in stored["shapes"].items()}
        lines = {(name, axis): None if line is None else str(line) for name, axis, line in stored["fixed"]}
        known = {axis: line for axis, line in lines.items() if line is not None}
        sizes = cls(shapes, tuple(stored["conditions"]), fixed=tuple(lines), lines=known)
        varying = set(sizes._varying())
        for text in sizes.conditions:
            if (axes := find_axes(text)) is None or not axes <= varying:
                raise ArtifactError(f"the stored program has '{text[:80]}', which is not a condition on its sizes")
        return sizes


_CHANGES: tuple[Callable[[int], int], ...] = (
    *(functools.partial(operator.add, step) for step in range(1, _MAX_STEP + 1)),
    functools.partial(operator.mul, 2),
    functools.partial(operator.mul, 3),
)
"""Functions from a size to another size, the nearest size first."""


def flatten_argument(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Yield the values in nested dicts, lists and tuples with their paths, such as ``batch['images'][0]``."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[object, object]] = value.items()
    elif type(value) in {list, tuple}:
        items = enumerate(value)  # type: ignore[arg-type]  # a list or a tuple
    else:
        yield path, value
        return
    for key, inner in items:
        yield from flatten_argument(inner, f"{path}[{key!r}]")


def describe_axes(axes: Collection[Axis]) -> str:
    """Describe axes in words, grouped by number: ``axis 1 of 'ids' and 'mask'``."""
    numbers = dict.fromkeys(axis for _, axis in axes)
    return ", ".join(f"axis {n} of {' and '.join(repr(name) for name, axis in axes if axis == n)}" for n in numbers)


def shorten_condition(condition: str) -> str:
    """Truncate a condition to the length of a line."""
    return condition if len(condition) <= _SHOWN else f"{condition[:_SHOWN]} …"


_Evaluate = Callable[[AxisSizes], int]


@dataclass(frozen=True, eq=False)
class _Condition:
    """A parsed condition: its axes, the two axes if it only requires them to be equal, and its evaluation."""

    axes: frozenset[Axis]
    equal: tuple[Axis, Axis] | None
    evaluate: _Evaluate


def find_axes(text: str) -> frozenset[Axis] | None:
    """Return the axes in a condition; None for text other than sizes, integers and known operators."""
    try:
        return _parse(text).axes
    except (SyntaxError, ValueError, LookupError, RecursionError, MemoryError):
        return None


def _holds(text: str, sizes: AxisSizes) -> bool:
    """Whether sizes meet a condition; False where the condition divides by 0."""
    try:
        return bool(_parse(text).evaluate(sizes))
    except ZeroDivisionError:
        return False


@functools.lru_cache(maxsize=8192)
def _parse(text: str) -> _Condition:
    """Parse a condition that was checked by ``find_axes`` when it was made or read."""
    if len(text) > _MAX_CONDITION:
        raise ValueError("a condition on sizes is too long")
    tree = ast.parse(text, mode="eval").body
    axes = frozenset(_parse_axis(node) for node in ast.walk(tree) if isinstance(node, ast.Subscript))
    evaluate = _compile(tree)
    equal = None
    if isinstance(tree, ast.Compare) and isinstance(tree.ops[0], ast.Eq):
        left, right = tree.left, tree.comparators[0]
        if isinstance(left, ast.Subscript) and isinstance(right, ast.Subscript):
            equal = (_parse_axis(left), _parse_axis(right))
    return _Condition(axes, equal, evaluate)


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
_UNARY: dict[type, Callable[[int], int]] = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
_LOGIC: dict[type, Callable[[Iterator[int]], bool]] = {ast.And: all, ast.Or: any}
_FUNCTIONS: dict[str, Callable[[Sequence[int]], int]] = {"min": min, "max": max}


def _compile(node: ast.expr) -> _Evaluate:
    """Return a function that computes a node of a condition from sizes."""
    match node:
        case ast.Constant(value=int(number)):
            return lambda sizes: number
        case ast.Subscript():
            return operator.itemgetter(_parse_axis(node))
        case ast.BinOp(left=left, op=op, right=right) | ast.Compare(left=left, ops=[op], comparators=[right]):
            binary, a, b = _BINARY[type(op)], _compile(left), _compile(right)
            return lambda sizes: binary(a(sizes), b(sizes))
        case ast.UnaryOp(op=op, operand=operand):
            unary, inner = _UNARY[type(op)], _compile(operand)
            return lambda sizes: unary(inner(sizes))
        case ast.BoolOp(op=op, values=values):
            logic, parts = _LOGIC[type(op)], [_compile(part) for part in values]
            return lambda sizes: logic(part(sizes) for part in parts)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if args:
            function, operands = _FUNCTIONS[name], [_compile(part) for part in args]
            return lambda sizes: function([part(sizes) for part in operands])
    raise ValueError(f"a condition on sizes has no {type(node).__name__}")


def _parse_axis(node: ast.Subscript) -> Axis:
    match node:
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=int(axis))):
            return name, axis
    raise ValueError("a condition indexes only inputs, by a number")
