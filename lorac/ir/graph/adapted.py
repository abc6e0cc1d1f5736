"""What one ``adapted`` op computes: the ``expand`` pass traces it, the reference interpreter runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorac.ir.graph import ops
from lorac.ir.host.sites import Site
from lorac.ir.slots.reads import presented
from lorac.ir.slots.run import Ctx, run_site
from lorac.ir.slots.site import SitePlan, SiteSlots

Tensor = torch.Tensor
VALUE_ROLE = "value:"
"""Before a program value's name among the operands of an adapted op."""


def adapted_output(
    plan: SitePlan,
    target: Any,
    host: Sequence[Tensor],
    operands: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    emitted: dict[str, list[Tensor]],
) -> Tensor:
    """The output of one call of an adapted site.

    Args:
        plan: the site's slots.
        target: the host's op.
        host: the tensors among that op's operands.
        operands: role -> tensor: the site's slots, ``down`` (x·A from a pack), and the program values it reads.
        sites: every site, for the layout of the values read.
        emitted: takes the extra outputs.
    """
    given = dict(operands)
    read = [role for role in given if role.startswith(VALUE_ROLE)]
    values = {role.removeprefix(VALUE_ROLE): given.pop(role) for role in read}
    ctx = Ctx(plan.site, values=presented(values, sites), emitted=emitted)
    down = given.pop("down", None)
    slots = SiteSlots.of_named(given, plan)
    if target is ops.BLOCK:
        x, block = host
        return run_site(plan, slots, x, None, None, ctx=ctx, block=block)
    x, matrix, *bias = host
    # A linear site's operand is the presented matrix; run_site takes the weight as the module stores it.
    stored = matrix.t() if target is ops.LINEAR and plan.site.transposed else matrix
    return run_site(plan, slots, x, stored, bias[0] if bias else None, ctx=ctx, down=down)
