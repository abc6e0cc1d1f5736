"""Branches of rows that have adapters of their own: a formula runs for each place, over the rows of its segment.

``torch.vmap`` runs a formula over all places at once, whatever it computes. Its parameters are those of a place, its
input and output and the values that it reads are the rows of a segment, as if the rows of that segment were the call.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lorac.ir.slots.batched_functions import BatchedFunctions
from lorac.ir.slots.execution import FormulaContext, compute_once_values, run_formula
from lorac.ir.slots.placed_execution import SegmentOps
from lorac.ir.slots.plans import BranchFill, BranchSlot, ValueAxis
from lorac.ir.slots.program_values import program_value_name

Mapped = Callable[[Sequence[Tensor], Sequence[Tensor], FormulaContext], Mapping[str, Tensor]]
"""(the parameters of a place, tensors of its rows, the context of that place) -> results by name."""
_DELTA = "delta"


def add_branch_in_places(
    slot: BranchSlot,
    fill: BranchFill,
    x: Tensor,
    y: Tensor,
    base: Tensor,
    ctx: FormulaContext,
    owner: str,
    segments: SegmentOps,
) -> Tensor:
    """Return y plus t·(y' − base) of one branch, each row with the strength and the parameters of its place.

    Args:
        fill: its strengths (places, 1, 1) and parameters (places, …).
        x: the site's input.
        y: its output without the branch.
        base: its output in the base.
        ctx: gets the branch's extra outputs.
        owner: as for ``lorac.ir.slots.execution.compute_branch_delta``.
        segments: the ways between a batch and its segments.
    """
    t = fill.strength

    def run(params: Sequence[Tensor], rows: Sequence[Tensor], inner: FormulaContext) -> dict[str, Tensor]:
        own_x, own_base = rows
        output, wide = run_formula(slot, params, own_x, own_base, inner, owner)
        return {_DELTA: output - wide, **{name: tensor for name, (tensor,) in inner.emitted.items()}}

    found = run_in_places(run, slot, [t, *fill.params], [x, base], ctx, owner, segments)
    by_row = {name: segments.join(tensor, x, x.dim() - 1) for name, tensor in found.items()}
    delta = segments.cut(by_row.pop(_DELTA), t, 1)
    for name, tensor in by_row.items():
        ctx.emit(name, tensor)
    return segments.join(segments.cut(y, t, 1) + (t * delta).to(y.dtype), y, 1)


def run_branch_alone_in_places(
    slot: BranchSlot, params: Sequence[Tensor], x: Tensor, y: Tensor, ctx: FormulaContext, segments: SegmentOps
) -> Tensor:
    """Return y' of one branch alone (``lorac.ir.slots.execution.run_branch_alone``), each row with its own."""

    def run(params: Sequence[Tensor], rows: Sequence[Tensor], inner: FormulaContext) -> dict[str, Tensor]:
        own_x, own_y = rows
        return {_DELTA: run_formula(slot, params, own_x, own_y, inner, "")[0].to(y.dtype)}

    found = run_in_places(run, slot, params, [x, y], ctx, "", segments)
    return segments.join(found[_DELTA], x, x.dim() - 1)


def compute_once_in_places(
    slot: BranchSlot, params: Sequence[Tensor], ctx: FormulaContext, owner: str, segments: SegmentOps
) -> dict[str, Tensor]:
    """Return the results of an adapter's ``once`` by the program's names: by row, or by place."""

    def run(params: Sequence[Tensor], _: Sequence[Tensor], inner: FormulaContext) -> dict[str, Tensor]:
        return compute_once_values(slot, params, inner, owner)

    found = run_in_places(run, slot, params, [], ctx, owner, segments)
    axes = _axes_by_program_name(slot, owner)
    rows = next((value for name, value in ctx.values.items() if axes.get(name) is ValueAxis.ROWS), None)
    if rows is None:
        return found
    by_row = {name for name in found if axes[name] is ValueAxis.ROWS}
    return {name: segments.join(v, rows, rows.dim() - 1) if name in by_row else v for name, v in found.items()}


def run_in_places(
    run: Mapped,
    slot: BranchSlot,
    params: Sequence[Tensor],
    rows: Sequence[Tensor],
    ctx: FormulaContext,
    owner: str,
    segments: SegmentOps,
) -> dict[str, Tensor]:
    """Return the results of ``run`` by name, with a first axis of places."""
    axes = _axes_by_program_name(slot, owner)
    own = {name: value for name, value in ctx.values.items() if axes.get(name, ValueAxis.NEITHER) != ValueAxis.NEITHER}
    given = [*rows, *(value for name, value in own.items() if axes[name] is ValueAxis.ROWS)]
    cut = iter([segments.cut(value, params[0], value.dim() - 1) for value in given])
    inputs = [next(cut) for _ in rows]
    values = [next(cut) if axes[name] is ValueAxis.ROWS else value for name, value in own.items()]
    names: list[str] = []

    def of_place(*tensors: Tensor) -> tuple[Tensor, ...]:
        parts = iter(tensors)
        own_params, own_rows = [next(parts) for _ in params], [next(parts) for _ in rows]
        inner = ctx.in_place({**ctx.values, **dict(zip(own, parts, strict=True))})
        with BatchedFunctions():
            results = run(own_params[len(own_params) - len(slot.params) :], own_rows, inner)
        names[:] = results
        return tuple(results.values())

    outputs = torch.vmap(of_place)(*params, *inputs, *values)
    return dict(zip(names, outputs, strict=True))


def _axes_by_program_name(slot: BranchSlot, owner: str) -> dict[str, ValueAxis]:
    assert slot.axes is not None
    return {program_value_name(owner, name): axis for name, axis in slot.axes.items()}
