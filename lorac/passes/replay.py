"""A part of a captured graph once more: as a pass of the base computes it, or a pass that an adapter has to itself.

What no adapted op reaches is not copied but shared with the pass that reads. In a pass of the base every adapted op is
undone; in one of an adapter's own its branches, which the method is asked for with the pass's name, come behind that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from torch import Tensor, fx

from lorac.errors import CompileError
from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import AdaptedCall, select_attention
from lorac.ir.graph.edit import inline
from lorac.ir.graph.graph import Graph
from lorac.ir.slots.execution import FormulaContext, run_branch_alone
from lorac.ir.slots.plans import BranchSlot
from lorac.ir.slots.program_values import IN, OUTPUT, OWN, find_branch, parse_value_name, present_weights
from lorac.ir.slots.roles import branch_name, parameter_role

ValueReader = Callable[[Collection[str], fx.Node], Mapping[str, fx.Node]]


@final
@dataclass(frozen=True)
class IsolatedPass:
    """Whose branches act in a pass, and in which.

    Attributes:
        name: what the adapter calls the pass; empty: it is one of the base, in which nothing acts.
        owner: what stands before the names of the adapter's own values
        (``lorac.ir.slots.program_values.owner_prefix``).
    """

    name: str = ""
    owner: str = ""


@final
@dataclass(frozen=True)
class Replay:
    """Repeats what leads to nodes of a graph at level adapted.

    Attributes:
        graph: edited in place.
        before: copies are put before this node; what is computed there already need not be copied.
        order: node -> its place in the graph.
        read: (names of program values, the node that reads them) -> their nodes.
    """

    graph: Graph
    before: fx.Node
    order: Mapping[fx.Node, int]
    read: ValueReader = field(repr=False)

    def copies(self, wanted: Iterable[fx.Node], alone: IsolatedPass) -> dict[fx.Node, fx.Node]:
        """Copy what leads to the wanted nodes; node -> what computes it in the pass, where that is another node.

        Raises:
            CompileError: the pass would write in place.
            SiteError: a value that a branch reads in the pass is not computed before it.
        """
        copies: dict[fx.Node, fx.Node] = {}
        for node in sorted(self._leading_to(wanted, alone), key=self.order.__getitem__):
            late = self.order[node] >= self.order[self.before]
            if late or node.target is ops.adapted or any(n in copies for n in node.all_input_nodes):
                copies[node] = self._copy(node, copies, alone)
        return copies

    def _leading_to(self, wanted: Iterable[fx.Node], alone: IsolatedPass) -> set[fx.Node]:
        """The wanted nodes and all that they are computed from in a pass."""
        needed, pending = set(), list(wanted)
        while pending:
            node = pending.pop()
            if node in needed:
                continue
            needed.add(node)
            pending.extend(self._operands(node, alone))
        return needed

    def _operands(self, node: fx.Node, alone: IsolatedPass) -> Sequence[fx.Node]:
        """The nodes of the host's that a node is computed from in a pass."""
        if node.target is not ops.adapted:
            return node.all_input_nodes
        call, place = AdaptedCall.of(node), self._branch(node, alone)
        if place is None:
            return call.tensors
        read = self.read(_in_pass(self._slot(node, place)), node)
        return [*call.tensors, *(value for name, value in read.items() if parse_value_name(name)[0] in {OUTPUT, IN})]

    def _branch(self, node: fx.Node, alone: IsolatedPass) -> int | None:
        """Which of the branches of an adapted op acts in a pass."""
        plan = self.graph.plan_of(ops.site_of(node))
        return find_branch(plan.branches, alone.owner) if alone.owner else None

    def _slot(self, node: fx.Node, place: int) -> BranchSlot:
        return self.graph.plan_of(ops.site_of(node)).branches[place]

    def _copy(self, node: fx.Node, copies: Mapping[fx.Node, fx.Node], alone: IsolatedPass) -> fx.Node:
        """A copy of a node, its operands copies where there are some; of an adapted op what it is in the pass."""
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            raise CompileError(
                f"a pass before the call's own cannot repeat {node.target}, which writes in place",
                next_step="switch the model's in-place operations (inplace=True) off",
            )
        with self.graph.fx.inserting_before(self.before):
            if node.target is not ops.adapted:
                return self.graph.fx.node_copy(node, lambda n: copies.get(n, n))
            call = AdaptedCall.of(node)
            plain = self.graph.fx.call_function(call.op, fx.map_arg(call.unadapted, lambda n: copies.get(n, n)))
        plain.meta = {**node.meta}
        place = self._branch(node, alone)
        return plain if place is None else self._branched(node, plain, place, copies, alone)

    def _branched(
        self, node: fx.Node, plain: fx.Node, place: int, copies: Mapping[fx.Node, fx.Node], alone: IsolatedPass
    ) -> fx.Node:
        """What a branch by itself makes of the base's output ``plain`` at the site of an adapted op."""
        call, slot = AdaptedCall.of(node), self._slot(node, place)
        read = self.read(_in_pass(slot), node)
        names = [parameter_role(branch_name(place), j) for j in range(len(slot.params))]
        given = [call.x, *(call.operands[name] for name in names), *read.values()]
        x, *others = (copies.get(value, value) for value in given)
        plan = self.graph.plan_of(call.site)
        around = functools.partial(
            FormulaContext, plan.site, attention=select_attention(self.graph), passing=alone.name
        )
        count, sites = len(names), self.graph.sites

        def function(x: Tensor, y: Tensor, *tensors: Tensor) -> tuple[Tensor]:
            values = present_weights(dict(zip(read, tensors[count:], strict=True)), sites)
            return (run_branch_alone(slot, tensors[:count], x, y, around(values=values)),)

        return inline(self.graph.exported, self.before, function, [x, plain, *others], origin=plain)[1][0]


def _in_pass(slot: BranchSlot) -> list[str]:
    """What a branch reads in a pass of its adapter's own: all but what is computed of that pass."""
    return [name for name in slot.reads if parse_value_name(name)[0] != OWN]
