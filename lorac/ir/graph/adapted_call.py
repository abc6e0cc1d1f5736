"""One call of an adapted site: the operands of its node by name, and its output.

The ``expand`` pass traces ``compute_adapted``; the reference interpreter calls it.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from lorac.argument_types import Fields, Operands
from lorac.ir.graph import attention_ops as attending
from lorac.ir.graph import ops, segment_ops
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.nodes import SLOTS_KEYWORD, copy_provenance
from lorac.ir.sites.site import Site
from lorac.ir.slots.attention import BranchAttention, FullAttention
from lorac.ir.slots.execution import FormulaContext, SiteCall, run_site
from lorac.ir.slots.placed_execution import add_branch_in_places, run_placed
from lorac.ir.slots.plans import BranchFill, SitePlan, SiteSlots
from lorac.ir.slots.program_values import (
    IN,
    OUTPUT,
    PASS,
    branch_owner,
    list_read_values,
    parse_value_name,
    present_weights,
    program_value_name,
)
from lorac.ir.slots.roles import ROLES, branch_roles

VALUE_PREFIX = "value:"
"""Prefix of the names of program values among the operands of an adapted op."""
MakeContext = Callable[..., FormulaContext]
"""Function that makes a ``FormulaContext`` from a site and ``values=``; its other fields are bound already."""


@dataclass(frozen=True)
class AdaptedCall:
    """The operands of an ``adapted`` node: nodes in a graph, tensors while a graph is run or traced.

    Attributes:
        op: the model's op, one of ``ops.SITE_OPS``.
        host: the model's operands of that op, without the site's path.
        operands: role -> the operands of the adapters: the site's slots, and the values that its branches read.
        site: the site's path.
    """

    op: Any
    host: Operands
    operands: Fields
    site: str

    @classmethod
    def of(cls, node: fx.Node) -> "AdaptedCall":
        """Return the operands of an ``adapted`` node."""
        arguments: Operands = node.args
        return cls(*arguments)

    @classmethod
    def adapting(cls, node: fx.Node, operands: Mapping[str, fx.Node]) -> "AdaptedCall":
        """Return the operands of an ``adapted`` node that replaces a call of a site's op."""
        return cls(node.target, ops.operands_of(node), operands, ops.site_of(node))

    @property
    def x(self) -> Any:
        """Input of the site."""
        return self.host[0]

    @property
    def tensors(self) -> list[Any]:
        """Tensors (in a graph, nodes) among the model's operands."""
        return [operand for operand in self.host if isinstance(operand, fx.Node | Tensor)]

    @property
    def unadapted(self) -> Operands:
        """Operands that ``op`` takes when the site is called without adapters."""
        return (*self.host, self.site)

    def insert_before(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Insert this call into a graph before ``node``, with that node's type and provenance."""
        with graph.inserting_before(node):
            call = graph.call_function(ops.adapted, self._arguments())
        call.meta["val"] = node.meta["val"]
        copy_provenance(call, node)
        call.meta["custom"] = {SLOTS_KEYWORD: self.site}
        return call

    def _arguments(self) -> Operands:
        return self.op, self.host, dict(self.operands), self.site


def add_operands(node: fx.Node, operands: Mapping[str, fx.Node]) -> None:
    """Add operands to an ``adapted`` node, by role."""
    call = AdaptedCall.of(node)
    node.args = dataclasses.replace(call, operands={**call.operands, **operands})._arguments()


def select_attention(graph: Graph) -> BranchAttention:
    """Return incremental attention for branches if the graph has causal attention; else full attention."""
    incremental = any(node.args[attending.CAUSAL_OPERAND] for node in graph.find(attending.ATTENTION))
    return attending.IncrementalAttention() if incremental else FullAttention()


def find_producing_call(node: fx.Node) -> fx.Node:
    """Return the call that computes a node's value: the fused call for a fused projection's output, else the node."""
    split = node.args[0] if node.target is operator.getitem else None
    fused = split.args[0] if isinstance(split, fx.Node) and split.target is ops.SPLIT else None
    return fused if isinstance(fused, fx.Node) else node


def find_used_nodes(graph: Graph) -> set[fx.Node]:
    """Return the nodes that reach an output of the program, or a site output that a branch reads."""
    parsed = map(parse_value_name, list_read_values(graph.plans.values()))
    read = {path for kind, path in parsed if kind in {OUTPUT, IN, PASS}}
    return graph.reaching_outputs([node for node in graph.find(*ops.SITE_CALLS) if ops.site_of(node) in read])


def group_sites_by_input(graph: Graph) -> dict[fx.Node, list[str]]:
    """Map each input value to the sites that read it, one entry per used call, in the order of calls.

    Blocks are left out, since the sites inside them read the same input. Sites of fused projections are left out too.
    """
    readers: dict[fx.Node, list[str]] = {}
    used = find_used_nodes(graph)
    for node in (node for node in graph.find(*ops.SITE_CALLS) if node in used):
        call = AdaptedCall.of(node) if node.target is ops.adapted else AdaptedCall.adapting(node, {})
        if call.op not in {ops.BLOCK, ops.MEMBER}:
            readers.setdefault(call.x, []).append(call.site)
    return readers


def compute_adapted(
    plan: SitePlan,
    call: AdaptedCall,
    sites: Mapping[str, Site],
    make_context: MakeContext = FormulaContext,
) -> Tensor:
    """Compute one call of an adapted site.

    Args:
        plan: the site's slots.
        call: the call; its operands are tensors.
        sites: every site, for the layouts of the values that branches read.
        make_context: makes the context of its branches.
    """
    if plan.has_placed_branches:
        base = y = call.op(*call.unadapted)
        if not plan.without_branches.empty:
            y = compute_adapted(plan.without_branches, without_branches(call), sites, make_context)
        for index in range(len(plan.branches)):
            operands = select_operands(plan, index, call)
            y = compute_placed_branch(plan, index, (call.x, y, base), operands, sites, make_context)
        return y
    ctx, tensors = _split_operands(plan, call.operands, sites, make_context)
    slots = SiteSlots.of_named(tensors, plan)
    if call.op is ops.BLOCK:
        x, block = call.tensors
        return run_site(plan, slots, SiteCall(x, ctx, block=block))
    x, matrix, *rest = call.tensors
    bias = rest[0] if rest else None
    product = matrix if call.op is ops.MEMBER else None
    # The operand of a linear site is its matrix (out, in); run_site takes the weight as the module stores it.
    stored = matrix.t() if call.op is ops.LINEAR and plan.site.transposed else matrix
    site_call = SiteCall(x, ctx, stored if product is None else None, bias, product=product)
    return run_placed(plan, slots, site_call, segment_ops.SEGMENTS) if plan.placed else run_site(plan, slots, site_call)


def select_operands(plan: SitePlan, index: int, call: AdaptedCall) -> dict[str, Any]:
    """Return the operands of one branch by role: its strength, its parameters and the values that it reads."""
    slot = plan.branches[index]
    owner = branch_owner(plan.branches[:index], slot)
    values = [f"{VALUE_PREFIX}{program_value_name(owner, name)}" for name in slot.reads]
    return {role: call.operands[role] for role in (*branch_roles(index, len(slot.params)), *values)}


def without_branches(call: AdaptedCall) -> AdaptedCall:
    """Return the call of a site without its branches."""
    return dataclasses.replace(call, operands={role: value for role, value in call.operands.items() if role in ROLES})


def compute_placed_branch(
    plan: SitePlan,
    index: int,
    rows: tuple[Tensor, Tensor, Tensor],
    operands: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    make_context: MakeContext,
) -> Tensor:
    """Compute a site's output with one more of its branches; the slots of the branch have an axis of places.

    Args:
        plan: the site's slots.
        index: index of the branch in the plan.
        rows: the site's input, its output so far, and its output in the base.
        operands: operands of the branch by role (``select_operands``).
        sites, make_context: as for ``compute_adapted``.
    """
    ctx, tensors = _split_operands(plan, operands, sites, make_context)
    strength, *params = tensors.values()
    slot, (x, y, base) = plan.branches[index], rows
    owner = branch_owner(plan.branches[:index], slot)
    fill = BranchFill(strength, tuple(params))
    return add_branch_in_places(slot, fill, x, y, base, ctx, owner, segment_ops.SEGMENTS)


def _split_operands(
    plan: SitePlan, operands: Mapping[str, Tensor], sites: Mapping[str, Site], make_context: MakeContext
) -> tuple[FormulaContext, dict[str, Tensor]]:
    """Split operands: return the context of the branches, with the values that they read, and all other operands."""
    values = {role.removeprefix(VALUE_PREFIX): v for role, v in operands.items() if role.startswith(VALUE_PREFIX)}
    tensors = {role: tensor for role, tensor in operands.items() if not role.startswith(VALUE_PREFIX)}
    return make_context(plan.site, values=present_weights(values, sites)), tensors
