"""Copies of a part of a captured graph, computed by the base or with one adapter.

Nodes that depend on no adapted op are not copied. In a pass of the base the model's op replaces every adapted op. In a
pass of an adapter, the adapter's branches are added, and their formulas get the pass's name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor, fx

from lorac.errors import CompileError
from lorac.ir.graph import ops, segment_ops
from lorac.ir.graph.adapted_call import AdaptedCall, select_attention
from lorac.ir.graph.edit import inline
from lorac.ir.graph.graph import Graph
from lorac.ir.slots.execution import FormulaContext, run_branch_alone
from lorac.ir.slots.placed_execution import run_branch_alone_in_places
from lorac.ir.slots.plans import BranchSlot
from lorac.ir.slots.program_values import IN, OUTPUT, OWN, find_branch, parse_value_name, present_weights
from lorac.ir.slots.roles import branch_roles

ValueReader = Callable[[Iterable[str], fx.Node], Mapping[str, fx.Node]]


@final
@dataclass(frozen=True)
class IsolatedPass:
    """A pass of the base, or of one adapter.

    Attributes:
        name: the adapter's name for the pass; empty for a pass of the base.
        owner: prefix of the names of the adapter's own values (``lorac.ir.slots.program_values.owner_prefix``).
    """

    name: str = ""
    owner: str = ""


@final
@dataclass(frozen=True)
class Replay:
    """A copier of the nodes on which some nodes of a graph at level adapted depend.

    Attributes:
        graph: edited in place.
        before: copies are inserted before this node; nodes that precede it need no copy.
        order: node -> its index in the graph.
        read: function (names of program values, the node that reads them) -> the values' nodes.
    """

    graph: Graph
    before: fx.Node
    order: Mapping[fx.Node, int]
    read: ValueReader = field(repr=False)

    def copy_nodes(self, nodes: Iterable[fx.Node], isolated: IsolatedPass) -> dict[fx.Node, fx.Node]:
        """Copy these nodes and all nodes on which they depend; return the copy of each copied node.

        Raises:
            CompileError: the pass would write in place.
            SiteError: a value that a branch reads in the pass is not computed before the branch.
        """
        needed: set[fx.Node] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending.extend(self._operands(node, isolated))
        copies: dict[fx.Node, fx.Node] = {}
        for node in sorted(needed, key=self.order.__getitem__):
            late = self.order[node] >= self.order[self.before]
            if late or node.target is ops.adapted or any(n in copies for n in node.all_input_nodes):
                copies[node] = self._copy(node, copies, isolated)
        return copies

    def _operands(self, node: fx.Node, isolated: IsolatedPass) -> Sequence[fx.Node]:
        if node.target is not ops.adapted:
            return node.all_input_nodes
        call, (_, slot) = AdaptedCall.of(node), self._find_branch(node, isolated)
        if slot is None:
            return call.tensors
        read = self.read(_values_of_pass(slot), node)
        return [*call.tensors, *(value for name, value in read.items() if parse_value_name(name)[0] in {OUTPUT, IN})]

    def _find_branch(self, node: fx.Node, isolated: IsolatedPass) -> tuple[int, BranchSlot | None]:
        """Return the adapted op's branch that acts in a pass, with its index; None if no branch does."""
        branches = self.graph.plan_of(ops.site_of(node)).branches
        index = find_branch(branches, isolated.owner) if isolated.owner else None
        return (0, None) if index is None else (index, branches[index])

    def _copy(self, node: fx.Node, copies: Mapping[fx.Node, fx.Node], isolated: IsolatedPass) -> fx.Node:
        """Copy a node, with the copies of its operands; an adapted op becomes its form in the pass."""
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            raise CompileError(
                f"an adapter needs a first pass of its own, which cannot repeat {node.target}: that op writes in place",
                next_step="switch the model's in-place operations (inplace=True) off",
            )
        with self.graph.fx.inserting_before(self.before):
            if node.target is not ops.adapted:
                return self.graph.fx.node_copy(node, lambda n: copies.get(n, n))
            call = AdaptedCall.of(node)
            plain = self.graph.fx.call_function(call.op, fx.map_arg(call.unadapted, lambda n: copies.get(n, n)))
        plain.meta = {**node.meta}
        index, slot = self._find_branch(node, isolated)
        if slot is None:
            return plain
        read = self.read(_values_of_pass(slot), node)
        _, *names = branch_roles(index, len(slot.params))
        operands = [call.x, *(call.operands[name] for name in names), *read.values()]
        x, *others = (copies.get(value, value) for value in operands)
        site, attention, sites = self.graph.plan_of(call.site).site, select_attention(self.graph), self.graph.sites

        def function(x: Tensor, y: Tensor, *tensors: Tensor) -> tuple[Tensor]:
            params, found = tensors[: len(names)], dict(zip(read, tensors[len(names) :], strict=True))
            values = present_weights(found, sites)
            ctx = FormulaContext(site, values=values, attention=attention, passing=isolated.name)
            if slot.axes is None:
                return (run_branch_alone(slot, params, x, y, ctx),)
            return (run_branch_alone_in_places(slot, params, x, y, ctx, segment_ops.SEGMENTS),)

        given, in_places = [x, plain, *others], slot.axes is not None
        return inline(self.graph.exported, self.before, function, given, origin=plain, in_places=in_places)[1][0]


def _values_of_pass(slot: BranchSlot) -> list[str]:
    """Return the values that a branch reads in its adapter's own pass: all except values of ``once``."""
    return [name for name in slot.reads if parse_value_name(name)[0] != OWN]
