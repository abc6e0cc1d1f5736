"""A model with an encoder becomes two graphs: what depends on the encoder's inputs alone, and what reads the text.

The first is run once for a text: it makes what the second reads of it for every token, the keys and values of the
attentions to what was encoded above all. Both are copies of one capture: what belongs to neither, such as constants,
each computes for itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from lorac.errors import Unavailable
from lorac.ir.graph import attention_ops as attending
from lorac.ir.graph import ops
from lorac.ir.graph.attention_ops import LOGITS_TO_KEEP, WITHOUT_CACHE, encoder_output_name, find_token_input
from lorac.ir.graph.edit import add_inputs, copy_program, drop_inputs, insert_call, set_outputs
from lorac.ir.graph.graph import Graph
from lorac.ir.output_structure import OutputStructure, name_outputs
from lorac.ir.sites import Site

aten = torch.ops.aten
T = TypeVar("T")
_ZEROS = frozenset({aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default})


def drop_zero_biases(graph: fx.Graph) -> None:
    """Biases of attentions that are zeros throughout are none, in place."""
    for node in graph.nodes:
        bias = node.args[3] if node.target is attending.ATTENTION else None
        if isinstance(bias, fx.Node) and bias.target in _ZEROS:
            node.update_arg(3, None)


def check_attention_cacheable(program: ExportedProgram, host: str) -> None:
    """Refuse attention of a text that no cache can stand for.

    Args:
        program: as captured.
        host: what its model is called.

    Raises:
        Unavailable: naming the module.
    """
    sides = _GraphHalves.of(program)
    for node in program.graph.nodes:
        if node.target is not attending.ATTENTION:
            continue
        why = sides.unfit(node)
        if why is not None:
            raise Unavailable(f"{host} keeps no cache: '{node.args[-1]}' {why}", next_step=WITHOUT_CACHE)


@dataclass(frozen=True)
class _GraphHalves:
    """Which values depend on the text that grows, and which on an encoder's inputs alone.

    Attributes:
        text: nodes that depend on the text.
        encoded: nodes that depend on other inputs, and not on the text.
        ids: the text.
    """

    text: frozenset[fx.Node]
    encoded: frozenset[fx.Node]
    ids: fx.Node

    @classmethod
    def of(cls, program: ExportedProgram) -> _GraphHalves:
        nodes = list(program.graph.nodes)
        given = _inputs(program)
        ids = given[find_token_input(given)]
        text = _fed(nodes, [ids, *(node for name, node in given.items() if name == LOGITS_TO_KEEP)])
        others = _fed(nodes, [node for node in given.values() if node not in text])
        return cls(frozenset(text), frozenset(others - text), ids)

    def crossing(self) -> list[fx.Node]:
        """What the text's side reads of the other, in order."""
        read = (operand for node in self.text for operand in node.all_input_nodes if operand in self.encoded)
        found = {operand for operand in read if isinstance(operand.meta.get("val"), torch.Tensor)}
        return [node for node in self.ids.graph.nodes if node in found]

    def unfit(self, node: fx.Node) -> str | None:
        """Why no cache can stand for an attention; None where one can."""
        operands: Any = node.args
        _, key, value, _, seen, _, _, causal, *_ = operands
        if node in self.encoded:
            return "attends causally in an encoder" if causal else None
        if {key, value} <= self.encoded:
            return "attends causally to what was encoded" if causal else None
        if not {key, value} <= self.text or str(key.meta["val"].shape[2]) != str(self.ids.meta["val"].shape[1]):
            return "attends to the text and to what was encoded at once"
        if seen is not None:
            return "attends by a mask of its own"
        return None if causal else "sees what comes later"


def _inputs(program: ExportedProgram) -> dict[str, fx.Node]:
    """The inputs that a program is called with."""
    own = {getattr(s.arg, "name", "") for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT}
    return {node.name: node for node in program.graph.nodes if node.op == "placeholder" and node.name in own}


def _fed(nodes: Iterable[fx.Node], first: Sequence[fx.Node]) -> set[fx.Node]:
    """What is computed of some values; a size of one is none of them."""
    found = set(first)
    for node in nodes:
        sized = isinstance(node.meta.get("val"), torch.SymInt | int)
        if node.op == "call_function" and not sized and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


# ── Two graphs of one ────────────────────────────────────────────────────────────────────────────────────────────────
def split_encoder_decoder(graph: Graph, encoder: str) -> tuple[Graph, ...]:
    """The graph of a decoder under the name of both, and that of its encoder; the graph alone where there is none.

    Args:
        graph: at level host; left as it was where it becomes two.
        encoder: the name of the second.

    Raises:
        Unavailable: the decoder reads nothing that was encoded, what is no matter of rows, or sizes it is not told.
    """
    sides = _GraphHalves.of(graph.exported)
    if not sides.encoded:
        return (graph,)
    crossing = {node.name: name for node, name in _named(sides).items()}
    rows = str(sides.ids.meta["val"].shape[0])
    by_row = [node.meta["val"].dim() and str(node.meta["val"].shape[0]) == rows for node in sides.crossing()]
    if not crossing or not all(by_row):
        what = "something of all rows at once" if crossing else "nothing"
        raise Unavailable(f"the decoder of graph '{graph.name}' reads {what} of its encoder", next_step=WITHOUT_CACHE)
    first, second = _decoder(graph, sides, crossing), _encoder(graph, sides, crossing)
    own = [_own_sites(graph.sites, half.exported) for half in (second, first)]
    second.plans, first.plans = _divided(graph.plans, *own)
    second.sites, first.sites = _divided(graph.sites, *own)
    second.name = encoder
    return first, second


def _named(sides: _GraphHalves) -> dict[fx.Node, str]:
    """What crosses, and what it is called: keys and values by their layer, the rest by what it is."""
    names: dict[fx.Node, str] = {}
    attentions = (node for node in sides.ids.graph.nodes if node in sides.text and node.target is attending.ATTENTION)
    crossing, layer = sides.crossing(), 0
    for node in attentions:
        own: Any = {"key": node.args[1], "value": node.args[2], "mask": node.args[4]}
        found = {what: value for what, value in own.items() if value in crossing and value not in names}
        names |= {value: encoder_output_name(f"{layer}.{what}") for what, value in found.items()}
        layer += own["key"] in crossing
    return {node: names.get(node) or encoder_output_name(node.name) for node in crossing}


def _encoder(graph: Graph, sides: _GraphHalves, crossing: Mapping[str, str]) -> Graph:
    """The half that is run once. It answers what the host does of it too."""
    made, nodes = _copy(graph)
    answered, _ = _answers(graph, sides)
    own = {name: nodes[node.name] for node, name in answered if node in sides.encoded}
    set_outputs(made.exported, own | {name: nodes[node] for node, name in crossing.items()})
    made.longest = None
    made.interface = dataclasses.replace(made.interface, constants={}, rows=None, notes=())
    signature = made.exported.module_call_graph[0].signature
    assert signature is not None
    return _cleared(made, {node.name for node in sides.text}, OutputStructure(signature.out_spec))


def _decoder(graph: Graph, sides: _GraphHalves, crossing: Mapping[str, str]) -> Graph:
    """The half that reads the text. What crosses is an input."""
    made, nodes = _copy(graph)
    answered, structure = _answers(graph, sides)
    set_outputs(made.exported, {name: nodes[node.name] for node, name in answered if node not in sides.encoded})
    values = {name: nodes[node].meta["val"] for node, name in crossing.items()}
    memory = add_inputs(made.exported, {name: (value.shape, value.dtype) for name, value in values.items()})
    made.cache_inputs = {name: node.name for name, node in memory.items()}
    for node, name in crossing.items():
        nodes[node].replace_all_uses_with(memory[name])
    return _cleared(made, {node.name for node in sides.encoded}, structure)


def _copy(graph: Graph) -> tuple[Graph, dict[str, fx.Node]]:
    """A graph to be edited apart from another, and its nodes by name."""
    program = copy_program(graph.exported)
    made = dataclasses.replace(graph, exported=program, slots={}, projections={}, axes=dict(graph.axes))
    return made, {node.name: node for node in program.graph.nodes}


def _answers(graph: Graph, sides: _GraphHalves) -> tuple[list[tuple[fx.Node, str]], OutputStructure]:
    """What the host answers, each with its name; and the structure of it in which the encoder's is left open."""
    structure = graph.interface.structure
    assert structure is not None
    leaves = [leaf for leaf in range(structure.spec.num_leaves) if leaf not in structure.constants]
    names = name_outputs(structure.spec, _inputs(graph.exported))
    output: Any = next(iter(reversed(graph.fx.nodes))).args[0]
    answered = dict(zip(leaves, output, strict=True))
    elsewhere = dict.fromkeys(leaf for leaf, node in answered.items() if node in sides.encoded)
    return (
        [(node, names[leaf]) for leaf, node in answered.items()],
        dataclasses.replace(structure, constants={**structure.constants, **elsewhere}),
    )


def _cleared(graph: Graph, other: Collection[str], structure: OutputStructure) -> Graph:
    """A half without the other's nodes; sizes that were read there are read of inputs that are left."""
    program, inputs = graph.exported, _inputs(graph.exported)
    left = [node for name, node in inputs.items() if name not in other]
    _erase(program, other)
    for node in list(program.graph.nodes):
        operands: Any = node.args
        if node.target is aten.sym_size.int and operands[0].name in other:
            node.replace_all_uses_with(_size(graph, node, left))
    _erase(program, other)
    drop_inputs(program, {name for name in inputs if name in other})
    graph.interface = graph.interface.restrict(_inputs(program), structure)
    return graph


def _erase(program: ExportedProgram, other: Collection[str]) -> None:
    """Take out nodes that nothing reads, and checks of the other half or of dtypes, which no half changes."""
    for node in reversed(list(program.graph.nodes)):
        idle = node.op == "call_function" and not node.users
        if idle and (node.name in other or node.target in {aten.sym_size.int, aten._assert_tensor_metadata.default}):
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()


def _size(graph: Graph, node: fx.Node, left: Sequence[fx.Node]) -> Any:
    """A size that varies, read of an input."""
    program, size = graph.exported, str(node.meta["val"])
    if size.isdecimal():
        return int(size)
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    for held in left:
        axes = [axis for axis, own in enumerate(held.meta["val"].shape) if str(own) == size]
        if axes:
            return insert_call(program, first, aten.sym_size.int, held, axes[0])
    raise Unavailable(
        f"the two halves of graph '{graph.name}' share a size that neither is told: {graph.axes.get(size, size)}",
        next_step=WITHOUT_CACHE,
    )


def _divided(whole: Mapping[str, T], encoder: Collection[str], decoder: Collection[str]) -> tuple[dict[str, T], ...]:
    """What is told of sites, for each half's own; of those that are nobody's, for the decoder's if it has any."""
    first, second = ({path: whole[path] for path in whole if path in own} for own in (encoder, decoder))
    idle = {path: told for path, told in whole.items() if path not in encoder and path not in decoder}
    return (first, second | idle) if second or not first else (first | idle, second)


def _own_sites(sites: Mapping[str, Site], program: ExportedProgram) -> set[str]:
    """Paths of the sites that a program calls, or whose weights it reads itself."""
    stored = {getattr(s.arg, "name", ""): str(s.target) for s in program.graph_signature.input_specs}
    called = {ops.site_of(node) for node in program.graph.nodes if node.target in ops.SITE_CALLS}
    read = {stored[node.name] for node in program.graph.nodes if node.op == "placeholder" and node.users}
    return called | {path for path, site in sites.items() if site.within is not None and site.weight in read}
