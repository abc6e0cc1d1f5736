"""One call of an adapted site: what its node holds, by name, and what it computes.

The ``expand`` pass traces ``adapted_output``, the reference interpreter runs it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lorac.ir.graph import attention_ops as attending
from lorac.ir.graph import ops
from lorac.ir.graph.edit import SLOTS_KEYWORD, copy_provenance
from lorac.ir.graph.graph import Graph
from lorac.ir.sites import Site
from lorac.ir.slots.attention import BranchAttention, FullAttention
from lorac.ir.slots.execution import FormulaContext, run_site
from lorac.ir.slots.plans import SitePlan, SiteSlots
from lorac.ir.slots.program_values import IN, OUTPUT, PASS, list_read_values, parse_value_name, present_weights

Tensor = torch.Tensor
VALUE_PREFIX = "value:"
"""Before a program value's name among the operands of an adapted op."""


@dataclass(frozen=True)
class AdaptedCall:
    """The arguments of an ``adapted`` node, in its order; the same over tensors while a graph runs or is traced.

    Attributes:
        op: the host's op, one of ``ops.OPS``.
        host: what the host calls that op with, without the site's path.
        operands: role -> what the adapters bring: the site's slots, and the program values that its branches read.
        site: the site's path.
    """

    op: Any
    host: tuple[Any, ...]
    operands: Mapping[str, Any]
    site: str

    @classmethod
    def of(cls, node: fx.Node) -> AdaptedCall:
        """What an ``adapted`` node holds."""
        arguments: tuple[Any, ...] = node.args
        return cls(*arguments)

    @classmethod
    def adapting(cls, node: fx.Node, operands: Mapping[str, fx.Node]) -> AdaptedCall:
        """The call that a node of a site's own op becomes when it is adapted."""
        return cls(node.target, ops.operands_of(node), operands, ops.site_of(node))

    @property
    def x(self) -> Any:
        """The site's input."""
        return self.host[0]

    @property
    def tensors(self) -> list[Any]:
        """The tensors (in a graph, the nodes) among the host's operands."""
        return [operand for operand in self.host if isinstance(operand, fx.Node | Tensor)]

    @property
    def unadapted(self) -> tuple[Any, ...]:
        """The arguments of ``op`` in a call of the site without its adapters."""
        return (*self.host, self.site)

    def insert_before(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Put this call into a graph before ``node``, with the type and provenance of that."""
        with graph.inserting_before(node):
            made = graph.call_function(ops.adapted, self._arguments())
        made.meta["val"] = node.meta["val"]
        copy_provenance(made, node)
        made.meta["custom"] = {SLOTS_KEYWORD: self.site}
        return made

    def _arguments(self) -> tuple[Any, ...]:
        return self.op, self.host, dict(self.operands), self.site


def add_operands(node: fx.Node, operands: Mapping[str, fx.Node]) -> None:
    """Give an ``adapted`` node more operands, by role."""
    call = AdaptedCall.of(node)
    node.args = dataclasses.replace(call, operands={**call.operands, **operands})._arguments()


def select_attention(graph: Graph) -> BranchAttention:
    """What the branches of a graph attend by: as its host does, where that is to keep a cache."""
    grows = any(node.args[attending.CAUSAL_OPERAND] for node in graph.find(attending.ATTENTION))
    return attending.IncrementalAttention() if grows else FullAttention()


def find_producing_call(node: fx.Node) -> fx.Node:
    """The call that gives a node's value: that of a pack where the node is one site's part of it, else the node."""
    cut = node.args[0] if node.target is operator.getitem else None
    whole = cut.args[0] if isinstance(cut, fx.Node) and cut.target is ops.SPLIT else None
    return whole if isinstance(whole, fx.Node) else node


def find_used_nodes(graph: Graph) -> set[fx.Node]:
    """The nodes whose values the program uses: for an output, or for a branch that reads what a site answers."""
    parsed = map(parse_value_name, list_read_values(graph.plans.values()))
    read = {path for kind, path in parsed if kind in {OUTPUT, IN, PASS}}
    return graph.reaching_outputs([node for node in graph.find(*ops.SITE_CALLS) if ops.site_of(node) in read])


def group_sites_by_input(graph: Graph) -> dict[fx.Node, list[str]]:
    """Value -> paths of the sites that take it as their input, one entry a useful call, in the order of the calls.

    Blocks are left out: what enters a block enters a site inside it.
    """
    readers: dict[fx.Node, list[str]] = {}
    used = find_used_nodes(graph)
    for node in (node for node in graph.find(*ops.SITE_CALLS) if node in used):
        call = AdaptedCall.of(node) if node.target is ops.adapted else AdaptedCall.adapting(node, {})
        if call.op is not ops.BLOCK:
            readers.setdefault(call.x, []).append(call.site)
    return readers


def compute_adapted(
    plan: SitePlan,
    call: AdaptedCall,
    sites: Mapping[str, Site],
    emitted: dict[str, list[Tensor]],
    attention: BranchAttention | None = None,
) -> Tensor:
    """The output of one call of an adapted site.

    Args:
        plan: the site's slots.
        call: over tensors.
        sites: every site, for the layout of the values read.
        emitted: takes the extra outputs.
        attention: what branches attend by; default: all of a text is there.
    """
    given = dict(call.operands)
    read = [role for role in given if role.startswith(VALUE_PREFIX)]
    values = {role.removeprefix(VALUE_PREFIX): given.pop(role) for role in read}
    ctx = FormulaContext(plan.site, values=present_weights(values, sites), emitted=emitted, attention=attention)
    slots = SiteSlots.of_named(given, plan)
    if call.op is ops.BLOCK:
        x, block = call.tensors
        return run_site(plan, slots, x, None, None, ctx=ctx, block=block)
    x, matrix, *bias = call.tensors
    # A linear site's operand is the presented matrix; run_site takes the weight as the module stores it.
    stored = matrix.t() if call.op is ops.LINEAR and plan.site.transposed else matrix
    return run_site(plan, slots, x, stored, bias[0] if bias else None, ctx=ctx)
