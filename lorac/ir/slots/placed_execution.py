"""The computation of an adapted site whose rows have different slots (``lorac.ir.slots.places``).

Eager mode runs it on views of the batch, and the other backends trace it with custom ops
(``lorac.ir.graph.segment_ops``), so that the computation exists once. A branch's formula runs for each place over the
rows of its segment, as if these rows were the whole call; ``torch.vmap`` runs it over all places at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorac.ir.slots.batched_functions import BatchedFunctions
from lorac.ir.slots.execution import (
    FormulaContext,
    SiteCall,
    add_bias,
    add_branches,
    compute_once_values,
    multiply_pair,
    run_formula,
    run_site,
)
from lorac.ir.slots.places import as_place, cut_segments, join_segments, stack_places
from lorac.ir.slots.plans import BranchFill, BranchSlot, SitePlan, SiteSlots, ValueAxis
from lorac.ir.slots.program_values import program_value_name


@dataclass(frozen=True)
class SegmentOps:
    """The functions that cut a batch into segments and join segments into a batch.

    Attributes:
        cut: (a batch, a slot with places, the number of axes of features) -> segments (places, tokens, …).
        join: (segments (places, tokens, N), a batch, its number of axes of features) -> a batch (…, N).
    """

    cut: Callable[[Tensor, Tensor, int], Tensor]
    join: Callable[[Tensor, Tensor, int], Tensor]


VIEWS = SegmentOps(lambda x, slot, features: cut_segments(x, slot.shape[0], features), join_segments)
"""Views of a contiguous batch, without copies."""


def why_shared(plan: SitePlan) -> str:
    """Return why all rows of a batch must share the slots of a site; empty if they need not."""
    return "" if plan.site.within is None else "its module computes with it in its own way"


def stack_site_slots(plan: SitePlan, each: Sequence[SiteSlots]) -> SiteSlots:
    """Stack a site's slots along an axis of places; roles that all rows share keep the first slots' tensor.

    Args:
        plan: the site's slots.
        each: the slots' tensors for each choice of adapters, in order, without active branches.
    """
    first = each[0].tensors
    stacked = {
        name: tensor
        if plan.why_shared(name)
        else stack_places([as_place(slots.tensors[name].detach()) for slots in each])
        for name, tensor in first.items()
    }
    return SiteSlots(stacked, (None,) * len(each[0].branches))


def run_placed(plan: SitePlan, slots: SiteSlots, call: SiteCall, segments: SegmentOps = VIEWS) -> Tensor:
    """Compute the output of an adapted site whose slots have places.

    Args:
        plan, slots, call: as for ``lorac.ir.slots.execution.run_site``.
        segments: the functions between a batch and its segments.
    """
    layout, x, product = call.layout, call.x, call.product
    active = any(fill is not None for fill in slots.branches)
    if active and product is None:
        product = call.multiply(x)
    slot = next(tensor for name, tensor in slots.tensors.items() if not plan.why_shared(name))
    features = layout.input_axes
    if not active and all(role.stage.of_pair for role, _ in plan.roles()):
        inside = call.bias if layout.keeps_bias_inside and product is None else None
        base = call.multiply(x, inside) if product is None else product
        pair = multiply_pair(layout, slots, segments.cut(x, slot, features))
        y = base + segments.join(pair, x, features).to(base.dtype)
        return add_bias(layout, y, call.bias if inside is None else None)
    cut = None if product is None else segments.cut(product, slot, layout.output_axes)
    parts = replace(call, x=segments.cut(x, slot, features), product=cut)
    y = segments.join(run_site(plan.without_branches, replace(slots, branches=()), parts), x, features)
    if not active:
        return y
    assert product is not None
    return add_branches(plan, slots, call, y, add_bias(layout, product, call.bias))


Mapped = Callable[[Sequence[Tensor], Sequence[Tensor], FormulaContext], Mapping[str, Tensor]]
"""Function (the parameters of a place, tensors of its rows, the context of the place) -> results by name."""
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
    """Return y plus t·(y' − base) of one branch; each row uses the strength and the parameters of its place.

    Args:
        fill: the branch's strengths (places, 1, 1) and parameters (places, …).
        x: the site's input.
        y: the site's output without the branch.
        base: the site's output in the base.
        ctx: the context, to which the branch's extra outputs are added.
        owner: as for ``lorac.ir.slots.execution.compute_branch_delta``.
        segments: the functions between a batch and its segments.
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
    """Compute ``lorac.ir.slots.execution.run_branch_alone`` with the parameters of each row's place."""

    def run(params: Sequence[Tensor], rows: Sequence[Tensor], inner: FormulaContext) -> dict[str, Tensor]:
        own_x, own_y = rows
        return {_DELTA: run_formula(slot, params, own_x, own_y, inner, "")[0].to(y.dtype)}

    found = run_in_places(run, slot, params, [x, y], ctx, "", segments)
    return segments.join(found[_DELTA], x, x.dim() - 1)


def compute_once_in_places(
    slot: BranchSlot, params: Sequence[Tensor], ctx: FormulaContext, owner: str, segments: SegmentOps
) -> dict[str, Tensor]:
    """Return the results of an adapter's ``once`` under the program's names, with a first axis of rows or of places."""

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
    """Call ``run`` for every place; return its results by name, with a first axis of places."""
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
