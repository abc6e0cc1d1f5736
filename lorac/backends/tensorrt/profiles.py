"""The sizes for which a plan is built: a minimum, a usual size and a maximum for every axis of every input.

Sizes of the model's inputs come from the example and from ``profiles=``, and satisfy the constraints of the captured
program. Ranks of slots are between the dialect's minimum and the planned maximum.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lorac.backends.tensorrt.options import ProfileShapes
from lorac.errors import InputMismatch, OptionError, check_known, short
from lorac.ir.algebra.changes import LowRank
from lorac.ir.calls.interface import Interface
from lorac.ir.calls.sizes import Axis, AxisSizes, SizeConstraints
from lorac.ir.graph.graph import Graph, SlotInput
from lorac.ir.graph.interpreter import read_example_inputs
from lorac.ir.graph.symbolic_shapes import constant_size
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.places import ADAPTERS_AXIS

DEFAULT_MAX_ROWS = 8
"""The default maximum of a batch, unless the example has more rows."""
DEFAULT_MAX_LENGTH = 512
"""The default maximum length of a sequence of tokens."""
_GROWTH = 2
"""The default maximum of other axes, as a multiple of the example's size."""


@dataclass(frozen=True)
class SizeRange:
    """Sizes of one axis: the minimum, the usual size for which kernels are chosen, and the maximum."""

    least: int
    usual: int
    most: int

    def __contains__(self, size: int) -> bool:
        return self.least <= size <= self.most


SizeRanges = Mapping[str, tuple[SizeRange, ...]]
"""Input -> a range per axis."""


def compute_ranges(
    graph: Graph, profiles: Mapping[str, ProfileShapes], snapshot: ComposedWeights, slots: Mapping[str, SlotInput]
) -> dict[str, tuple[SizeRange, ...]]:
    """Return the sizes of every input for which a graph's plan is built.

    Args:
        graph: the lowered graph.
        profiles: the option ``profiles``.
        snapshot: the initially active choice; its ranks are the usual ones.
        slots: the slots that are inputs.

    Raises:
        OptionError: the model does not support the sizes.
    """
    ranges = _input_ranges(graph, profiles)
    rows = next((axes[0].most for axes in ranges.values() if axes), 1)
    places = SizeRange(*profiles.get(ADAPTERS_AXIS, (1, 1, rows)))
    for name, slot in slots.items():
        shape = graph.node(slot.node).meta["val"].shape
        plan, composed = graph.plans[slot.site], snapshot.composed.get(slot.site)
        change = None if composed is None else composed.change
        usual = change.rank if isinstance(change, LowRank) else None
        rank = SizeRange(plan.least_rank, min(max(usual or plan.rank, plan.least_rank), plan.rank), plan.rank)
        first = (places,) if slot.placed else ()
        numbers = map(constant_size, shape[len(first) :])  # a dynamic size is a rank
        ranges[name] = (*first, *(rank if number is None else SizeRange(number, number, number) for number in numbers))
    return ranges


def check_profile_names(profiles: Mapping[str, ProfileShapes], graphs: Collection[Graph]) -> None:
    """Refuse profiles for inputs or axes that no graph has.

    Raises:
        OptionError: naming the nearest known input or axis.
    """
    known = [name for each in graphs for name in (*each.interface.inputs, *axis_names(each.interface).values())]
    known += [ADAPTERS_AXIS] if any(slot.placed for each in graphs for slot in each.slots.values()) else []
    check_known(profiles, dict.fromkeys(known), "for profiles= the model has no input or axis")


def check_sizes(ranges: SizeRanges, inputs: Mapping[str, torch.Tensor], names: Mapping[Axis, str]) -> None:
    """Refuse inputs with sizes for which a plan was not built.

    Args:
        ranges: the ranges of the plan.
        inputs: the inputs of a call, by name.
        names: the names of the axes.

    Raises:
        InputMismatch: naming the ``profiles=`` that allows the sizes.
    """
    sizes = ((name, axis, size) for name, value in inputs.items() for axis, size in enumerate(np.shape(value)))
    for name, axis, size in sizes:
        range_ = ranges[name][axis]
        if size in range_:
            continue
        least, most = min(size, range_.least), max(size, range_.most)
        profiles = f"profiles={{'{names.get((name, axis), name)}': ({least}, {range_.usual}, {most})}}"
        raise InputMismatch(
            f"input '{name}' has size {size} on axis {axis}; the plan is for {range_.least} to {range_.most}",
            next_step=f"compile with {profiles}",
        )


def axis_names(interface: Interface) -> dict[Axis, str]:
    """Return the names of dynamic axes: (input, axis) -> name."""
    varying = [(name, i) for name, shape in interface.sizes.shapes.items() for i, size in enumerate(shape) if not size]
    types = {name: interface.types[name].partition("[")[2].removesuffix("]").split(", ") for name, _ in varying}
    return {(name, axis): types[name][axis] for name, axis in varying}


def _input_ranges(graph: Graph, profiles: Mapping[str, ProfileShapes]) -> dict[str, tuple[SizeRange, ...]]:
    """Return the ranges of the model's inputs; axes without a profile get ranges around the example's sizes."""
    interface = graph.interface
    examples, names, sizes = read_example_inputs(graph, interface.inputs), axis_names(interface), interface.sizes
    requested = _requested_ranges(examples, names, profiles)
    usual = {axis: requested[axis].usual if axis in requested else examples[axis[0]].shape[axis[1]] for axis in names}
    _check_conditions(sizes, usual, "opt")
    begin = usual | {axis: range_.least for axis, range_ in requested.items()}

    def larger(axis: Axis, size: int) -> Iterable[int]:
        name, number = axis
        text = not examples[name].is_floating_point()
        most = DEFAULT_MAX_ROWS if number == 0 else DEFAULT_MAX_LENGTH if text else size * _GROWTH
        return range(most, size, -1)

    least = _extreme_sizes(sizes, begin, names, requested, lambda _, size: range(1, size))
    _check_conditions(sizes, least, "min")
    begin = usual | {axis: range_.most for axis, range_ in requested.items()}
    most = _extreme_sizes(sizes, begin, names, requested, larger)
    _check_conditions(sizes, most, "max")
    found = {axis: SizeRange(least[axis], usual[axis], most[axis]) for axis in names}
    return {
        name: tuple(found.get((name, i)) or SizeRange(size, size, size) for i, size in enumerate(value.shape))
        for name, value in examples.items()
    }


def _requested_ranges(
    examples: Mapping[str, torch.Tensor], names: Mapping[Axis, str], profiles: Mapping[str, ProfileShapes]
) -> dict[Axis, SizeRange]:
    found = {axis: SizeRange(*profiles[name]) for axis, name in names.items() if name in profiles}
    for name in [name for name in examples if name in profiles]:
        rows = [tuple(row) for row in profiles[name]]  # type: ignore[arg-type]  # shapes
        axes = [SizeRange(*sizes) for sizes in zip(*rows, strict=True)]
        shape = examples[name].shape
        fixed = [i for i, size in enumerate(shape) if (name, i) not in names]
        if len(axes) != len(shape) or any(axes[i] != SizeRange(shape[i], shape[i], shape[i]) for i in fixed):
            expected = ", ".join(str(size) if i in fixed else names[name, i] for i, size in enumerate(shape))
            raise OptionError(
                f"profiles= has {short(profiles[name])} for '{name}', whose shape is [{expected}]",
                next_step="give shapes with as many axes, and the sizes that do not vary as they are; dynamic_shapes= "
                "says which sizes may vary",
            )
        found |= {(name, i): range_ for i, range_ in enumerate(axes) if i not in fixed}
    return found


def _extreme_sizes(
    sizes: SizeConstraints,
    start: AxisSizes,
    names: Mapping[Axis, str],
    requested: Mapping[Axis, SizeRange],
    tries: Callable[[Axis, int], Iterable[int]],
) -> dict[Axis, int]:
    """Return sizes at one end of the ranges: for each name, the first candidate that the model supports."""
    found = dict(start)
    for name in dict.fromkeys(name for axis, name in names.items() if axis not in requested):
        axes = [axis for axis, other in names.items() if other == name and axis not in requested]
        candidates = (found | dict.fromkeys(axes, size) for size in tries(axes[0], start[axes[0]]))
        found = next((tried for tried in candidates if sizes.admits(tried)), found)
    return found


def _check_conditions(sizes: SizeConstraints, chosen: AxisSizes, which: str) -> None:
    """Refuse sizes that the model does not support."""
    shapes = {
        name: tuple(chosen[name, i] if size is None else size for i, size in enumerate(shape))
        for name, shape in sizes.shapes.items()
    }
    try:
        sizes.check({name: np.broadcast_to(np.int8(0), shape) for name, shape in shapes.items()})
    except InputMismatch as error:
        raise OptionError(
            f"profiles= has {which} sizes that the model does not take: {error.what}", next_step=error.next_step
        ) from error
