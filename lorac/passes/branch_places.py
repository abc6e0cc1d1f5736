"""Branches of a graph with places, so that each row of a batch may have a different branch.

Where a formula computes the rows of a batch independently, it runs once for each place (``ir.slots.placed_execution``).
To find out whether it does, this module traces it once, over examples of the values that it reads.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from lorac.frontend.capture.decoder_families import find_sequence
from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import select_attention
from lorac.ir.graph.edit import find_fake_mode
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.nodes import describe_type, get_example
from lorac.ir.sites.site import SiteKind, factor_dtype
from lorac.ir.slots.attention import BranchAttention, FullAttention
from lorac.ir.slots.execution import FormulaContext, compute_once_values, run_formula
from lorac.ir.slots.plans import BranchSlot, SitePlan, ValueAxis
from lorac.ir.slots.program_values import (
    IN,
    INPUT,
    OUTPUT,
    OWN,
    PARAM,
    WEIGHT,
    parse_value_name,
    present_weights,
    program_value_name,
)
from lorac.passes.rows_apart import FormulaCall


class _NotByRowError(Exception):
    """A branch that cannot run for a part of a batch's rows; the message says why, as a clause."""


def has_rows(value: Tensor, batch: torch.SymInt) -> bool:
    """Return whether the first axis of a value is the rows of the batch."""
    first = value.shape[0] if value.dim() else None
    return isinstance(first, torch.SymInt) and first.node.expr == batch.node.expr


def place_branches(
    graph: Graph, batch: torch.SymInt | None, calls: Mapping[str, Sequence[fx.Node]], shared: dict[str, list[str]]
) -> dict[str, SitePlan]:
    """Return the plans of sites with branches, with places where rows may differ; update the graph's plans.

    Args:
        graph: its plans are edited.
        batch: the symbolic number of rows; None where it is fixed.
        calls: path of a site with branches -> its calls.
        shared: reason why rows share slots -> paths of the sites; sites whose branches have no places are added.
    """
    if batch is None:
        return {}
    examiner, placed = _BranchExaminer(graph, batch), dict[str, SitePlan]()
    once = {path: plan for path, plan in graph.plans.items() if plan.site.kind is SiteKind.ONCE}
    for path, plan in once.items():
        placed[path], _ = examiner.place_once(plan)
    for path, nodes in calls.items():
        placed[path], why = examiner.place(graph.plan_of(path), nodes)
        if why:
            shared.setdefault(why, []).append(path)
    apart = {slot.once for path in calls for slot in placed[path].branches if slot.once and slot.axes is None}
    for path, plan in list(placed.items()):
        if path in apart or any(slot.once in apart for slot in plan.branches):
            placed[path] = replace(plan, branches=tuple(replace(slot, axes=None) for slot in plan.branches))
    graph.plans = {path: placed.get(path, plan) for path, plan in graph.plans.items()}
    return {path: placed[path] for path in calls}


@dataclass
class _BranchExaminer:
    """Examiner of how the branches of a graph read their values by row.

    Attributes:
        graph: at level host.
        batch: the symbolic number of rows.
    """

    graph: Graph
    batch: torch.SymInt
    _own: dict[tuple[str, str], tuple[Tensor, ValueAxis]] = field(default_factory=dict)
    _examined: dict[object, str] = field(default_factory=dict)

    @functools.cached_property
    def _calls(self) -> Mapping[str, fx.Node]:
        """Module path -> the module's last call."""
        return {ops.site_of(node): node for node in self.graph.find(*ops.SITE_CALLS)}

    def place_once(self, plan: SitePlan) -> tuple[SitePlan, str]:
        """Return a ``once`` site's plan with places for its branches; or the unchanged plan, and the reason."""

        def place(slot: BranchSlot) -> BranchSlot:
            with find_fake_mode(self.graph.exported):
                values, axes = self._read(slot)
                ctx = FormulaContext(plan.site, values=values)
                found = compute_once_values(slot, _make_parameters(plan, slot), ctx, "")
            for name, value in found.items():
                own = _own_name(name)
                by_row = self._axis(value, own) is ValueAxis.ROWS
                axes[own] = ValueAxis.ROWS if by_row else ValueAxis.PLACES
                self._own[plan.site.path, own] = value, axes[own]
            placed, results = replace(slot, axes=axes), {name: axes[_own_name(name)] for name in found}
            call = FormulaCall(
                lambda params, _, ctx: compute_once_values(slot, params, ctx, ""),
                placed,
                [],
                values,
                FormulaContext(plan.site),
                results,
            )
            if why := call.why_together(self.batch):
                raise _NotByRowError(why)
            return placed

        return self._place_all(plan, place)

    def place(self, plan: SitePlan, calls: Sequence[fx.Node]) -> tuple[SitePlan, str]:
        """Return a site's plan with places for its branches; or the unchanged plan, and the reason.

        Args:
            calls: the site's calls, whose input and output have the rows of the batch.
        """

        def place(slot: BranchSlot) -> BranchSlot:
            with find_fake_mode(self.graph.exported):
                values, axes = self._read(slot)
            for call in calls:
                rows = [get_example(call.args[0]), get_example(call)]
                if not all(has_rows(value, self.batch) for value in rows):
                    raise _NotByRowError("the rows of its input or output are not those of the batch")
                key = (slot.key, slot.reads, *(describe_type(value) for value in (*rows, *values.values())))
                if key not in self._examined:
                    self._examined[key] = self._why_together(plan, replace(slot, axes=axes), rows, values)
                if self._examined[key]:
                    raise _NotByRowError(self._examined[key])
            return replace(slot, axes=axes)

        return self._place_all(plan, place)

    def _place_all(self, plan: SitePlan, place: Callable[[BranchSlot], BranchSlot]) -> tuple[SitePlan, str]:
        try:
            with torch.no_grad():
                return replace(plan, branches=tuple(map(place, plan.branches))), ""
        except _NotByRowError as error:
            return plan, str(error)

    def _why_together(
        self, plan: SitePlan, slot: BranchSlot, rows: Sequence[Tensor], values: Mapping[str, Tensor]
    ) -> str:
        """Return why a branch does not compute the rows of a batch independently; empty if it does."""
        attention, emitted = _RecordedAttention(), dict[str, list[Tensor]]()
        ctx = FormulaContext(plan.site, values=values, emitted=emitted, attention=attention)
        with find_fake_mode(self.graph.exported):
            run_formula(slot, _make_parameters(plan, slot), rows[0], rows[1], ctx, "")
        shared = [name for name, (tensor,) in emitted.items() if self._axis(tensor, name) is not ValueAxis.ROWS]
        if shared:
            return f"a branch gives '{shared[0]}' for all rows together"
        if attention.used and not isinstance(select_attention(self.graph), FullAttention):
            return "a branch attends over a cache of its own"
        context = FormulaContext(plan.site)

        def run(params: Sequence[Tensor], rows: Sequence[Tensor], ctx: FormulaContext) -> dict[str, Tensor]:
            return {OUTPUT: run_formula(slot, params, rows[0], rows[1], ctx, "")[0]}

        return FormulaCall(run, slot, rows, values, context, {OUTPUT: ValueAxis.ROWS}).why_together(self.batch)

    def _read(self, slot: BranchSlot) -> tuple[dict[str, Tensor], dict[str, ValueAxis]]:
        """Return examples of the values that a branch reads, by the program's names, and their first axes."""
        values, axes = dict[str, Tensor](), dict[str, ValueAxis]()
        for name in slot.reads:
            kind, rest = parse_value_name(name)
            if kind == OWN and (slot.once, name) not in self._own:
                raise _NotByRowError(f"a branch reads '{name}', which all rows share")
            if kind == OWN:
                example, axes[name] = self._own[slot.once, name]
            else:
                example = self._example(kind, rest, name)
                axes[name] = ValueAxis.NEITHER if kind in {WEIGHT, PARAM} else self._axis(example, name)
            values[program_value_name("", name)] = example
        return present_weights(values, self.graph.sites), axes

    def _example(self, kind: str, rest: str, name: str) -> Tensor:
        """Return the example of a value in the traced call."""
        inputs = {node.name: node for node in self.graph.placeholders()}
        found: object = None
        if kind == INPUT:  # a mask that a call omits is made from the ids
            found = inputs.get(self.graph.interface.aliases.get(rest, rest), inputs.get(find_sequence(inputs).ids))
        elif kind in {WEIGHT, PARAM}:
            stored = self.graph.sites[rest].weight if kind == WEIGHT else rest
            tensor = self.graph.exported.state_dict.get(str(stored))
            if tensor is not None:
                return torch.empty(tensor.shape, dtype=tensor.dtype)
        elif rest in self._calls:
            found = self._calls[rest].args[0] if kind == IN else self._calls[rest]
        if found is None:
            raise _NotByRowError(f"a branch reads '{name}', whose size is not known before")
        return get_example(found)

    def _axis(self, value: Tensor, name: str) -> ValueAxis:
        """Return whether a value's first axis is the rows of the batch; raise if another axis depends on them."""
        if has_rows(value, self.batch):
            return ValueAxis.ROWS
        sizes: list[object] = [*value.shape]
        found = [size.node.expr.free_symbols for size in sizes if isinstance(size, torch.SymInt)]
        if not any(self.batch.node.expr in symbols for symbols in found):
            return ValueAxis.NEITHER
        raise _NotByRowError(f"the rows of '{name}' are not those of the batch")


def _own_name(name: str) -> str:
    """Return a branch's name for a value of ``once``, given the name in a context without an owner."""
    return name.replace(f"{OWN}:.", f"{OWN}:")


def _make_parameters(plan: SitePlan, slot: BranchSlot) -> list[Tensor]:
    return [torch.empty(shape, dtype=factor_dtype(plan.site.dtype)) for shape in slot.params.values()]


class _RecordedAttention(BranchAttention):
    """Attention over whole sequences that records whether a formula uses it."""

    used = False

    def positions(self, x: Tensor) -> Tensor:
        self.used = True
        return FullAttention().positions(x)

    def attend(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> Tensor:
        self.used = True
        return FullAttention().attend(name, q, k, v, causal=causal, mask=mask, scale=scale)
