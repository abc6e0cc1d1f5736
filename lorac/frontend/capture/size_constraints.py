"""The sizes that a capture allows: their names, and the conditions that torch's trace found."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._sympy.functions import FloorDiv, Mod
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter

from lorac.frontend.capture.trace_guards import TraceGuard, find_fixing_line
from lorac.frontend.inputs.dynamic_shapes import list_dynamic_axes
from lorac.ir.calls.sizes import Axis, SizeConstraints, find_axes, flatten_argument
from lorac.ir.graph.edit import find_fake_mode
from lorac.ir.graph.nodes import find_input_examples
from lorac.ir.graph.symbolic_shapes import SYMBOL, constant_size

_BATCH = "batch"


def name_axes(program: ExportedProgram, dynamic_shapes: Mapping[str, object]) -> dict[str, str]:
    """Return torch's symbol for a size -> its name: a ``Dim``'s name, "batch" for a first axis, else input and axis.

    Args:
        program: as captured.
        dynamic_shapes: input -> axis -> ``Dim`` or hint, as torch.export takes them.
    """
    names: dict[str, str] = {}
    inputs = find_input_examples(program)
    sizes = ((name, axis, str(size)) for name, value in inputs.items() for axis, size in enumerate(value.shape))
    for name, axis, symbol in sizes:
        if not SYMBOL.fullmatch(symbol) or symbol in names:
            continue
        axes = dynamic_shapes.get(name)
        given_name = getattr(axes.get(axis), "__name__", None) if isinstance(axes, Mapping) else None
        default_name = _BATCH if axis == 0 and _BATCH not in names.values() else f"{name}.{axis}"
        names[symbol] = given_name if given_name is not None and given_name not in names.values() else default_name
    return names


def collect_dynamic_axes(values: Mapping[str, object], shapes: Mapping[str, Any]) -> list[Axis]:
    """Return the axes that dynamic shapes declare as dynamic, by the paths of tensors in arguments.

    Args:
        values: arguments by name.
        shapes: dynamic shapes of the arguments, with the same nesting.
    """
    dims = {path: dim for name, axes in shapes.items() for path, dim in flatten_argument(axes, name)}
    tensors = (found for name, value in values.items() for found in flatten_argument(value, name))
    return [
        (path, axis)
        for path, tensor in tensors
        if isinstance(tensor, Tensor)
        for axis in list_dynamic_axes({axis: dims.get(f"{path}[{axis}]") for axis in range(tensor.dim())})
    ]


def collect_constraints(
    program: ExportedProgram, requested: Collection[Axis], guards: Sequence[TraceGuard] = ()
) -> SizeConstraints:
    """Return the sizes for which a program was captured, and the conditions on them that torch found or assumed.

    Args:
        program: as captured.
        requested: the axes that were requested to vary.
        guards: the guards of the trace, with the lines of the model that caused them.
    """
    inputs = find_input_examples(program)
    shapes = {name: tuple(constant_size(size) for size in value.shape) for name, value in inputs.items()}
    fixed = tuple((name, axis) for name, axis in requested if name in shapes and shapes[name][axis] is not None)
    found_at: dict[Axis, str | None] = {}
    for name, axis in fixed:
        size = inputs[name].shape[axis]
        # torch keeps its symbol for a requested size even if the trace fixed the size.
        symbol = str(size) if isinstance(size, int) else str(size.node._expr)
        found_at[name, axis] = find_fixing_line(guards, symbol)
    lines = {axis: line for axis, line in found_at.items() if line is not None}
    environment = find_fake_mode(program).shape_env if inputs else None
    locations, found = _locate_symbols(inputs)
    if environment is not None:
        found += [environment.replace(guard.expr).xreplace(locations) for guard in environment.guards]
    for size, bounds in program.range_constraints.items():
        if size in locations:  # torch admits no size below 2, even if the range allows it
            found.append(sympy.Ge(locations[size], max(2, int(bounds.lower))))
        if size in locations and bounds.upper not in (int_oo, sympy.oo):
            found.append(sympy.Le(locations[size], int(bounds.upper)))
    varying = {(name, axis) for name, axis, _ in _varying_sizes(inputs)}
    conditions = {PythonPrinter().doprint(condition): condition for condition in found if condition.free_symbols}
    known = {text: c for text, c in conditions.items() if (axes := find_axes(text)) is not None and axes <= varying}
    # An empty batch takes another path through most models, which no trace covers.
    least = tuple(f"{name}[{axis}] >= 1" for name, axis in sorted(varying))
    assumed = []  # the conditions that only exclude sizes that are 0, 1 or equal to another size, as torch often does
    for text, condition in known.items():
        strict = isinstance(condition, sympy.StrictLessThan | sympy.StrictGreaterThan)
        bounds = strict or isinstance(condition, sympy.Le | sympy.Ge)
        small = bounds and condition.lts.is_Integer and condition.lts <= (1 if strict else 2)
        if small or isinstance(condition, sympy.Ne):
            assumed.append(text)
    others = (text for text in known if text not in assumed)
    return SizeConstraints(shapes, (*least, *others), tuple(assumed), fixed, lines)


def _locate_symbols(inputs: Mapping[str, Tensor]) -> tuple[dict[sympy.Expr, sympy.Expr], list[sympy.Basic]]:
    """Return torch's symbol -> the first axis of that size, and the conditions between these and other axes."""
    sizes = [
        (sympy.Symbol(f"{name}[{axis}]", integer=True, positive=True), size.node.expr)
        for name, axis, size in _varying_sizes(inputs)
    ]
    locations: dict[sympy.Expr, sympy.Expr] = {}
    for axis, size in sizes:
        if size.is_Symbol:
            locations.setdefault(size, axis)
    found: list[sympy.Basic] = []
    for axis, size in sizes:
        unknown = size.free_symbols - locations.keys()
        if len(unknown) == 1:  # a derived Dim, such as 2*d, where d is not the size of an axis
            (symbol,) = unknown
            factor = size.coeff(symbol)
            rest = sympy.expand(size - factor * symbol).xreplace(locations)
            locations[symbol] = FloorDiv(axis - rest, factor)
            found.append(sympy.Eq(Mod(axis - rest, factor), 0))
        elif not unknown and locations.get(size) != axis:
            found.append(sympy.Eq(axis, size.xreplace(locations)))
    return locations, found


def _varying_sizes(inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, int, torch.SymInt]]:
    sizes = ((name, axis, size) for name, value in inputs.items() for axis, size in enumerate(value.shape))
    for name, axis, size in sizes:
        if isinstance(size, torch.SymInt) and constant_size(size) is None:
            yield name, axis, size
