"""The form of program that torch's own tools accept: only aten ops, with slots as inputs."""

import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram

from lorac.argument_types import Fields
from lorac.backends.aoti import adaptive_pools
from lorac.backends.aoti.package import keep_sizes_of_one
from lorac.backends.onnx.passes import OnnxDialect
from lorac.ir.graph import segment_ops
from lorac.ir.graph.edit import (
    add_constant,
    copy_program,
    drop_inputs,
    drop_unused_sizes,
    edit_keywords,
    insert_call,
    move_inputs_last,
    set_outputs,
)
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.interpreter import TIE_BREAKING_OPS
from lorac.ir.graph.nodes import SLOTS_KEYWORD, find_module_path, find_source_line, find_user_inputs
from lorac.ir.graph.passes import Pass, PassResult
from lorac.ir.sites.site import SiteKind
from lorac.ir.slots.plans import RankPolicy
from lorac.ir.slots.roles import is_strength
from lorac.storage.tensor_file import file_order
from lorac.target.dialect import BranchGate, Dialect
from lorac.third_party_output import suppress_third_party_output

aten = torch.ops.aten
_NAMESPACES = frozenset({"aten", "prim", "prims"})
"""The namespaces of the ops that torch itself registers."""
_CONVOLUTIONS = (SiteKind.CONV1D, SiteKind.CONV2D, SiteKind.CONV3D)


@dataclass(frozen=True)
class LowerToTorch(Pass):
    """expanded -> target: replace lorac's ops by aten ops, resolve ties to the lowest index, and gate branches.

    Views that split a batch into segments require contiguous tensors, so inputs are copied first.
    """

    name: ClassVar[str] = "torch"
    reads: ClassVar[Level] = Level.EXPANDED
    leaves: ClassVar[Level] = Level.TARGET

    def apply(self, graph: Graph) -> PassResult:
        # Select 0 where a branch has strength 0, since its zeros may become NaN; copy the inputs of a cut program.
        program, slots = graph.exported, {slot.node: slot for slot in graph.slots.values()}
        first = next(node for node in graph.fx.nodes if node.op not in {"placeholder", "get_attr"})
        cuts = any(True for _ in graph.find(segment_ops.CUT))
        for name, node in find_user_inputs(program).items():
            if name in slots and is_strength(slots[name].role):
                for scaled in [user for user in node.users if user.target is aten.mul.Tensor]:
                    users, after = list(scaled.users), scaled.next
                    is_on = insert_call(program, after, aten.ne.Scalar, node, 0)
                    selected = insert_call(program, after, aten.where.ScalarOther, is_on, scaled, 0.0)
                    for user in users:
                        user.replace_input_with(scaled, selected)
            elif name in slots:
                continue
            elif cuts and node.users and isinstance(value := node.meta["val"], Tensor) and value.dim() > 1:
                copied = insert_call(program, first, aten.clone.default, node, memory_format=torch.contiguous_format)
                node.replace_all_uses_with(copied, lambda user, copied=copied: user is not copied)  # type: ignore[misc]  # the default binds the loop's value
        with torch.no_grad(), suppress_third_party_output(), keep_sizes_of_one():
            graph.exported = graph.exported.run_decompositions(_DECOMPOSITIONS)
        for check in graph.find(aten._assert_tensor_metadata.default):  # checks of the example's metadata
            graph.fx.erase_node(check)
        return PassResult(changed=True)


def _view(x: Tensor, shape: Sequence[int]) -> Tensor:
    strides = [*itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1)]
    return torch.as_strided(x.contiguous(), shape, strides[::-1])


_DECOMPOSITIONS: dict[Any, Callable[..., object]] = {
    # ``lorac.ir.slots.places`` checks that one dynamic size divides another, which needs no check here.
    segment_ops.CUT: lambda x, slot, count: _view(
        x, (slot.shape[0], math.prod(x.shape[: x.dim() - count]) // slot.shape[0], *x.shape[x.dim() - count :])
    ),
    segment_ops.JOIN: lambda y, like, count: _view(y, (*like.shape[: like.dim() - count], *y.shape[2:])),
    **TIE_BREAKING_OPS,
    **adaptive_pools.DECOMPOSITIONS,
}

DIALECT: OnnxDialect = Dialect(
    name="aoti",
    claims=frozenset(),  # torch's own ops are claimed by namespace
    passes=(LowerToTorch(),),
    gates=BranchGate.WHERE,
    ranks=dict.fromkeys(_CONVOLUTIONS, RankPolicy.FIXED),  # Inductor fixes the sizes of a convolution's weight
    dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    fuses_projections=False,  # the program would concatenate the fused matrix at every call
    rows=True,
    why_shared=dict.fromkeys(_CONVOLUTIONS, "a program of torch's convolves all rows with one kernel"),
    why_branches_shared="its branches have one place in a program of torch's",
)


def list_foreign_ops(graph: Graph) -> list[str]:
    """Return the ops of a graph that torch itself does not register, each with the module and line that calls it."""
    found: dict[str, None] = {}
    for node in graph.fx.nodes:
        if isinstance(node.target, OpOverload) and node.target.namespace not in _NAMESPACES:
            module, line = find_module_path(node), find_source_line(node)
            asked = f", which '{module}' asks for" if module else ""
            found[f"{node.target._schema.name}{asked}{f', {line}' if line else ''}"] = None
    return list(found)


def make_plain_program(graph: Graph, slots: Mapping[str, Tensor], *, constant: bool) -> ExportedProgram:
    """Convert a graph at level target to a program that torch's own tools accept, without classes of other libraries.

    A call passes the model's own arguments, and all slots as ``lorac={slot: tensor}``; it returns a dict by output
    name.

    Args:
        graph: the graph, which is not modified.
        slots: the tensors of a choice, for the example call; if empty, the example has zeros.
        constant: whether these tensors become constants of a program without slots.
    """
    program = copy_program(graph.exported)
    copies = {node.name: node for node in program.graph.nodes}
    outputs = list(program.graph.output_node().args[0])[-len(graph.interface.outputs) :]
    set_outputs(program, dict(zip(graph.interface.outputs, outputs, strict=True)))
    if constant:
        for slot in graph.slots.values():
            copies[slot.node].replace_all_uses_with(add_constant(program, slots[slot.name].contiguous()))
        drop_inputs(program, {SLOTS_KEYWORD, *(slot.node for slot in graph.slots.values())})
    elif graph.slots:  # AOTInductor reads a dict in order, which must be the order of a choice's file
        order = file_order({name: copies[slot.node].meta["val"] for name, slot in graph.slots.items()})
        move_inputs_last(program, [graph.slots[name].node for name in order])

        def sort_slots(given: Fields) -> Fields:
            return {**given, SLOTS_KEYWORD: {name: {**given[SLOTS_KEYWORD], **slots}[name] for name in order}}

        edit_keywords(program, sort_slots)
    drop_unused_sizes(program)
    program.graph_module.recompile()
    return program
