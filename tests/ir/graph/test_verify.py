"""The verifier: each rule, broken on purpose, is reported with the pass and the node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx

from lorac.ir.graph import ops
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.passes import Pass, PassResult, run_pipeline
from lorac.ir.graph.verify import verify
from lorac.passes.pipelines import lowering_passes
from tests.captured import capture, lower
from tests.refusing import refuses

aten = torch.ops.aten


def _at(level: Level) -> Graph:
    """A graph at a level."""
    graph = capture("plain_mlp").graph
    for step in lowering_passes():
        if graph.level is level:
            return graph
        run_pipeline(graph, [step])
    return graph


def _refused(graph: Graph, node: str, what: str) -> None:
    with refuses("verification_failed") as caught:
        verify(graph, after="culprit")
    message = str(caught.value)
    assert "after 'culprit'" in message
    assert node in message
    assert what in message


def _parameter(graph: Graph) -> fx.Node:
    names = graph.exported.graph_signature.inputs_to_parameters
    return next(node for node in graph.placeholders() if node.name in names and node.users)


def test_accepts_a_check_of_values_which_returns_nothing() -> None:
    graph = _at(Level.EXPANDED)
    with graph.fx.inserting_after(graph.placeholders()[-1]):
        graph.fx.call_function(aten._assert_scalar.default, (True, "holds"))
    verify(graph, after="nothing")


@pytest.mark.parametrize("level", [Level.HOST, Level.ADAPTED, Level.EXPANDED])
def test_accepts_graphs_of_every_level(level: Level) -> None:
    verify(_at(level), after="nothing")


def test_an_operand_that_is_not_computed_yet() -> None:
    graph = _at(Level.EXPANDED)
    reader = next(n for n in graph.fx.nodes if n.op == "call_function" and n.all_input_nodes[0].op == "call_function")
    operand = reader.all_input_nodes[0]
    reader.append(operand)
    _refused(graph, reader.name, f"reads {operand.name} before it is computed")


def test_an_adapted_op_at_level_host() -> None:
    graph = _at(Level.ADAPTED)
    graph.level = Level.HOST
    node = next(graph.find(ops.adapted))
    _refused(graph, node.name, "does not belong at level host")


@pytest.mark.parametrize("level", [Level.EXPANDED, Level.TARGET])
def test_a_site_that_was_not_expanded(level: Level) -> None:
    graph = _at(Level.ADAPTED)
    graph.level = level
    node = next(n for n in graph.fx.nodes if n.target is ops.adapted or n.target in ops.SITE_OPS)
    _refused(graph, node.name.split("_")[0], f"does not belong at level {level.name.lower()}")


def test_a_value_without_a_type() -> None:
    graph = _at(Level.EXPANDED)
    node = next(n for n in graph.fx.nodes if n.op == "call_function")
    del node.meta["val"]
    _refused(graph, node.name, "has no type")


def test_rejects_a_slot_that_is_not_an_input() -> None:
    graph = _at(Level.ADAPTED)
    name, slot = next(iter(graph.slots.items()))
    node = graph.node(slot.node)
    node.replace_all_uses_with(_parameter(graph))
    graph.fx.erase_node(node)
    _refused(graph, name, "is not an input of the graph any more")


def test_a_slot_that_nothing_reads() -> None:
    graph = _at(Level.ADAPTED)
    name, slot = next(iter(graph.slots.items()))
    node = graph.node(slot.node)
    node.replace_all_uses_with(_parameter(graph))
    _refused(graph, node.name, f"slot '{name}' reaches no output")


def test_rejects_a_slot_whose_readers_reach_no_output() -> None:
    """It is still read, but what is computed from it is bypassed."""
    graph = _at(Level.EXPANDED)
    name, slot = next(iter(graph.slots.items()))
    node = graph.node(slot.node)
    untouched = next(n for n in graph.fx.nodes if n.op == "call_function" and node not in n.all_input_nodes)
    output = next(iter(reversed(graph.fx.nodes)))
    output.args = ((untouched,),)
    assert node.users
    _refused(graph, node.name, f"slot '{name}' reaches no output")


def test_a_write_to_a_base_weight() -> None:
    graph = _at(Level.EXPANDED)
    parameter = _parameter(graph)
    with graph.fx.inserting_before(next(n for n in graph.fx.nodes if n.op != "placeholder")):
        written = graph.fx.call_function(aten.add_.Tensor, (parameter, 1))
    written.meta["val"] = parameter.meta["val"]
    _refused(graph, written.name, f"writes to the base weight {parameter.name}")


@dataclass(frozen=True)
class Broken(Pass):
    """Forgets what a value is."""

    name: ClassVar[str] = "broken"
    reads: ClassVar[Level] = Level.HOST
    leaves: ClassVar[Level] = Level.HOST

    def apply(self, graph: Graph) -> PassResult:
        del next(n for n in graph.fx.nodes if n.op == "call_function").meta["val"]
        return PassResult(changed=True)


def test_runs_after_every_pass() -> None:
    graph = capture("plain_mlp").graph
    pack, *others = lowering_passes()
    with refuses("verification_failed", match="after 'broken'"):
        run_pipeline(graph, [pack, Broken(), *others])


@pytest.mark.medium("capture's and emission's errors, which name lines by the same function")
def test_the_message_names_the_source_line() -> None:
    graph = capture("tiny_llama").graph
    lower(graph)
    node = next(n for n in graph.fx.nodes if n.op == "call_function" and "modeling_llama" in n.meta["stack_trace"])
    del node.meta["val"]
    with refuses("verification_failed", match=r"modeling_llama\.py"):
        verify(graph, after="culprit")
