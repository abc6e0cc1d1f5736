"""A model with an encoder becomes two graphs: the encoder's, which depends only on its inputs, and the decoder's.

The encoder's graph runs once per sequence. It computes the values that the decoder reads for every token, mainly the
keys and values of cross-attention. Both are copies of one capture; nodes that belong to neither, such as constants, are
computed in both.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import fx
from torch.export import ExportedProgram

from lorac.argument_types import Operands
from lorac.errors import Unavailable
from lorac.frontend.capture.attention_interface import check_attention_captured
from lorac.ir.calls.output_structure import OutputStructure, name_outputs
from lorac.ir.graph import attention_ops, ops
from lorac.ir.graph.attention_ops import LOGITS_TO_KEEP, WITHOUT_CACHE, encoder_output_name, find_token_input
from lorac.ir.graph.edit import add_inputs, copy_program, drop_inputs, insert_call, set_outputs
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.nodes import find_dependents, find_user_inputs
from lorac.ir.graph.passes import PassResult, TracePass

aten = torch.ops.aten
T = TypeVar("T")
_ZEROS = frozenset({aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default})


@final
@dataclass(frozen=True)
class CheckAttention(TracePass):
    """Drop attention biases that are zeros, and dead nodes; refuse attention that cannot use a cache.

    Attributes:
        model: class name of the captured model.
    """

    name: ClassVar[str] = "check_attention"
    model: str = "the model"

    def apply(self, graph: Graph) -> PassResult:
        """Drop the biases.

        Raises:
            Unavailable: an attention cannot use a cache; the error names the module.
        """
        changed = False
        for node in graph.find(attention_ops.ATTENTION):
            bias = node.args[attention_ops.BIAS_OPERAND]
            if isinstance(bias, fx.Node) and bias.target in _ZEROS:
                node.update_arg(attention_ops.BIAS_OPERAND, None)
                changed = True
        changed |= graph.fx.eliminate_dead_code()
        check_attention_captured(graph.exported, self.model)
        halves = _GraphHalves.of(graph.exported)
        for node in graph.find(attention_ops.ATTENTION):
            problem = halves.find_problem(node)
            if problem is not None:
                raise Unavailable(f"{self.model} keeps no cache: '{node.args[-1]}' {problem}", next_step=WITHOUT_CACHE)
        return PassResult(changed)


@dataclass(frozen=True)
class _GraphHalves:
    """The nodes that depend on the growing sequence, and the nodes that depend only on an encoder's inputs.

    Attributes:
        text: nodes that depend on the sequence.
        encoded: nodes that depend on other inputs, and not on the sequence.
        ids: the input with the sequence's token ids.
    """

    text: frozenset[fx.Node]
    encoded: frozenset[fx.Node]
    ids: fx.Node

    @classmethod
    def of(cls, program: ExportedProgram) -> "_GraphHalves":
        nodes = list(program.graph.nodes)
        given = find_user_inputs(program)
        ids = given[find_token_input(given)]
        text = find_dependents(nodes, [ids, *(node for name, node in given.items() if name == LOGITS_TO_KEEP)])
        others = find_dependents(nodes, [node for node in given.values() if node not in text])
        return cls(frozenset(text), frozenset(others - text), ids)

    def crossing(self) -> list[fx.Node]:
        """Return the encoder's values that the decoder reads, in order."""
        read = (operand for node in self.text for operand in node.all_input_nodes if operand in self.encoded)
        found = {operand for operand in read if isinstance(operand.meta.get("val"), torch.Tensor)}
        return [node for node in self.ids.graph.nodes if node in found]

    def find_problem(self, node: fx.Node) -> str | None:
        """Return why an attention cannot use a cache; None if it can."""
        operands: Operands = node.args
        _, key, value, _, seen, _, _, _, causal, *_ = operands
        if node in self.encoded:
            return "attends causally in an encoder" if causal else None
        if {key, value} <= self.encoded:
            return "attends causally to what was encoded" if causal else None
        if not {key, value} <= self.text or str(key.meta["val"].shape[2]) != str(self.ids.meta["val"].shape[1]):
            return "attends to the text and to what was encoded at once"
        if seen is not None:
            return "attends by a mask of its own"
        return None if causal else "sees what comes later"


def split_encoder_decoder(graph: Graph, encoder: str) -> tuple[Graph, ...]:
    """Split a graph with an encoder into the decoder's graph, which keeps the name, and the encoder's graph.

    Args:
        graph: a graph at level host; unchanged if it is split.
        encoder: name of the encoder's graph.

    Returns:
        The decoder's graph and the encoder's graph; only the given graph if it has no encoder.

    Raises:
        Unavailable: the decoder reads nothing from its encoder, or values that all rows share, or sizes that no input
            has.
    """
    halves = _GraphHalves.of(graph.exported)
    if not halves.encoded:
        return (graph,)
    names: dict[fx.Node, str] = {}
    nodes = (node for node in halves.ids.graph.nodes if node in halves.text)
    attentions = (node for node in nodes if node.target is attention_ops.ATTENTION)
    values, layer = halves.crossing(), 0
    for node in attentions:
        operands: Any = {"key": node.args[1], "value": node.args[2], "mask": node.args[4]}
        found = {name: value for name, value in operands.items() if value in values and value not in names}
        names |= {value: encoder_output_name(f"{layer}.{name}") for name, value in found.items()}
        layer += operands["key"] in values
    crossing = {node.name: names.get(node) or encoder_output_name(node.name) for node in values}
    rows = {str(node.meta["val"].shape[0]) for node in find_user_inputs(graph.exported).values()}
    by_row = [node.meta["val"].dim() and str(node.meta["val"].shape[0]) in rows for node in values]
    if not crossing or not all(by_row):
        read = "something of all rows at once" if crossing else "nothing"
        raise Unavailable(f"the decoder of graph '{graph.name}' reads {read} of its encoder", next_step=WITHOUT_CACHE)
    first, second = _decoder(graph, halves, crossing), _encoder(graph, halves, crossing)
    divide_sites(second, first)
    second.name = encoder
    return first, second


def divide_sites(encoder: Graph, decoder: Graph) -> None:
    """Restrict each of two graphs to the sites that it uses; sites that neither uses go to the decoder."""
    paths: list[set[str]] = []
    for half in (encoder, decoder):
        stored = {getattr(s.arg, "name", ""): str(s.target) for s in half.exported.graph_signature.input_specs}
        called = {ops.site_of(node) for node in half.fx.nodes if node.target in ops.SITE_CALLS}
        read = {stored[node.name] for node in half.fx.nodes if node.op == "placeholder" and node.users}
        inside = {path for path, site in half.sites.items() if site.within is not None and site.weight in read}
        paths.append(called | inside)
    encoder.plans, decoder.plans = _divide(decoder.plans, *paths)
    encoder.sites, decoder.sites = _divide(decoder.sites, *paths)


def _encoder(graph: Graph, halves: _GraphHalves, crossing: Mapping[str, str]) -> Graph:
    """Return the encoder's half, which runs once; its outputs include its parts of the host's output."""
    half, nodes = _copy(graph)
    outputs, _ = _list_outputs(graph, halves)
    own_outputs = {name: nodes[node.name] for node, name in outputs if node in halves.encoded}
    set_outputs(half.exported, own_outputs | {name: nodes[node] for node, name in crossing.items()})
    half.longest = None
    half.interface = dataclasses.replace(half.interface, constants={}, rows=None, notes=())
    signature = half.exported.module_call_graph[0].signature
    assert signature is not None
    return _remove_other_half(half, {node.name for node in halves.text}, OutputStructure(signature.out_spec))


def _decoder(graph: Graph, halves: _GraphHalves, crossing: Mapping[str, str]) -> Graph:
    """Return the decoder's half; the encoder's values that it reads are inputs."""
    half, nodes = _copy(graph)
    outputs, structure = _list_outputs(graph, halves)
    set_outputs(half.exported, {name: nodes[node.name] for node, name in outputs if node not in halves.encoded})
    values = {name: nodes[node].meta["val"] for node, name in crossing.items()}
    encoder_outputs = add_inputs(half.exported, {name: (value.shape, value.dtype) for name, value in values.items()})
    half.cache_inputs = {name: node.name for name, node in encoder_outputs.items()}
    for node, name in crossing.items():
        nodes[node].replace_all_uses_with(encoder_outputs[name])
    return _remove_other_half(half, {node.name for node in halves.encoded}, structure)


def _copy(graph: Graph) -> tuple[Graph, dict[str, fx.Node]]:
    """Return an editable copy of a graph, and its nodes by name."""
    program = copy_program(graph.exported)
    half = dataclasses.replace(
        graph, exported=program, slots={}, projections={}, axes=dict(graph.axes), skips=dict(graph.skips)
    )
    return half, {node.name: node for node in program.graph.nodes}


def _list_outputs(graph: Graph, halves: _GraphHalves) -> tuple[list[tuple[fx.Node, str]], OutputStructure]:
    """Return the host's output tensors with their names, and its output structure without the encoder's part."""
    structure = graph.interface.structure
    assert structure is not None
    leaves = [leaf for leaf in range(structure.spec.num_leaves) if leaf not in structure.constants]
    names = name_outputs(structure.spec, find_user_inputs(graph.exported))
    output: Any = next(iter(reversed(graph.fx.nodes))).args[0]
    outputs = dict(zip(leaves, output, strict=True))
    elsewhere = dict.fromkeys(leaf for leaf, node in outputs.items() if node in halves.encoded)
    return (
        [(node, names[leaf]) for leaf, node in outputs.items()],
        dataclasses.replace(structure, constants={**structure.constants, **elsewhere}),
    )


def _remove_other_half(graph: Graph, other: Collection[str], structure: OutputStructure) -> Graph:
    """Remove the other half's nodes; sizes that were read there are read from the remaining inputs instead."""
    program, inputs = graph.exported, find_user_inputs(graph.exported)
    left = [node for name, node in inputs.items() if name not in other]
    _erase_unused(program, other)
    for node in list(program.graph.nodes):
        operands: Operands = node.args
        if node.target is aten.sym_size.int and operands[0].name in other:
            node.replace_all_uses_with(_read_size(graph, node, left))
    _erase_unused(program, other)
    drop_inputs(program, {name for name in inputs if name in other})
    graph.interface = graph.interface.restrict(find_user_inputs(program), structure)
    return graph


def _erase_unused(program: ExportedProgram, other: Collection[str]) -> None:
    """Remove unused nodes of the other half, and assertions of dtypes, which hold in both halves."""
    for node in reversed(list(program.graph.nodes)):
        unused = node.op == "call_function" and not node.users
        if unused and (node.name in other or node.target in {aten.sym_size.int, aten._assert_tensor_metadata.default}):
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()


def _read_size(graph: Graph, node: fx.Node, left: Sequence[fx.Node]) -> Any:
    """Return a varying size, read from a remaining input."""
    program, size = graph.exported, str(node.meta["val"])
    if size.isdecimal():
        return int(size)
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    for source in left:
        axes = [axis for axis, axis_size in enumerate(source.meta["val"].shape) if str(axis_size) == size]
        if axes:
            return insert_call(program, first, aten.sym_size.int, source, axes[0])
    raise Unavailable(
        f"encoder and decoder of graph '{graph.name}' share a size that is not an input's: "
        f"{graph.axes.get(size, size)}",
        next_step=WITHOUT_CACHE,
    )


def _divide(whole: Mapping[str, T], encoder: Collection[str], decoder: Collection[str]) -> tuple[dict[str, T], ...]:
    """Split a mapping by site between the halves; entries of unused sites go to the decoder if it has any sites."""
    first, second = ({path: whole[path] for path in whole if path in paths} for paths in (encoder, decoder))
    unowned = {path: value for path, value in whole.items() if path not in encoder and path not in decoder}
    return (first, second | unowned) if second or not first else (first | unowned, second)
