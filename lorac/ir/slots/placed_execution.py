"""The computation of an adapted site whose rows have slots of their own (``lorac.ir.slots.rows``).

Eager mode runs it on views of the batch, and the other backends trace it with ops of their own
(``lorac.ir.graph.row_ops``), so that none has another computation for rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lorac.ir.slots.execution import SiteCall, add_bias, add_branches, multiply_pair, run_site
from lorac.ir.slots.plans import SitePlan, SiteSlots
from lorac.ir.slots.roles import ROLES
from lorac.ir.slots.rows import as_place, cut_segments, join_segments, stack_places


@dataclass(frozen=True)
class SegmentOps:
    """The ways between a batch and its segments.

    Attributes:
        cut: (a batch, a slot with places, the number of axes of features) -> segments (places, tokens, …).
        join: (segments (places, tokens, N), a batch, its number of axes of features) -> a batch (…, N).
    """

    cut: Callable[[Tensor, Tensor, int], Tensor]
    join: Callable[[Tensor, Tensor, int], Tensor]


VIEWS = SegmentOps(lambda x, slot, features: cut_segments(x, slot.shape[0], features), join_segments)
"""Views of a batch that lies in one piece: nothing is copied."""


def why_shared(plan: SitePlan) -> str:
    """Return why all rows of a batch share the slots of a site, wherever it is called; empty where they need not."""
    return "" if plan.site.within is None else "its module computes with it in its own way"


def stack_site_slots(each: Sequence[SiteSlots]) -> SiteSlots:
    """Return a site's slots with places, one for each of its slots without; roles that rows share are the first's.

    Args:
        each: the site's slots for one choice of adapters after the other, without active branches.
    """
    first = each[0].tensors
    stacked = {
        name: tensor
        if ROLES[name].why_shared
        else stack_places([as_place(slots.tensors[name].detach()) for slots in each])
        for name, tensor in first.items()
    }
    return SiteSlots(stacked, (None,) * len(each[0].branches))


def run_placed(plan: SitePlan, slots: SiteSlots, call: SiteCall, segments: SegmentOps = VIEWS) -> Tensor:
    """Return the output of an adapted site whose slots have places.

    Args:
        plan, slots, call: as for ``lorac.ir.slots.execution.run_site``.
        segments: the ways between a batch and its segments.
    """
    layout, x, product = call.layout, call.x, call.product
    active = any(fill is not None for fill in slots.branches)
    if active and product is None:
        product = call.multiply(x)
    slot = next(tensor for name, tensor in slots.tensors.items() if not ROLES[name].why_shared)
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
