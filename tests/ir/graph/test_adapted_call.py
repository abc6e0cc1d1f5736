"""The adapted node: its parts by name, how it is made and extended, and who reads the same input."""

from __future__ import annotations

import pytest
from torch import fx

import lorac
from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import AdaptedCall, add_operands, group_sites_by_input
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.passes import run_pipeline
from lorac.passes.insert import InsertAdaptedCalls
from tests.captured import captured_stack, lower

QUERY = "body.layers.0.query"


def _call_of(graph: Graph, path: str, *targets: object) -> fx.Node:
    return next(node for node in graph.find(*targets) if ops.site_of(node) == path)


@pytest.fixture
def graph() -> Graph:
    """At level host, with a low-rank pair at every site."""
    return captured_stack({"all": lorac.LoRA(r=2)})


def test_an_adapted_node_keeps_operands_and_provenance(graph: Graph) -> None:
    plain = _call_of(graph, QUERY, ops.LINEAR)
    x, weight, bias = ops.operands_of(plain)
    before, value, arguments = plain.meta["nn_module_stack"], plain.meta["val"], plain.args
    run_pipeline(graph, [InsertAdaptedCalls()])
    node = _call_of(graph, QUERY, ops.adapted)
    call = AdaptedCall.of(node)
    assert (call.op, call.host, call.site) == (ops.LINEAR, (x, weight, bias), QUERY)
    assert (call.x, call.tensors, call.unadapted) == (x, [x, weight, bias], arguments)
    assert {role: operand.name for role, operand in call.operands.items()} == {
        role: graph.slots[f"{QUERY}:{role}"].node for role in ("a", "b")
    }
    assert (node.meta["nn_module_stack"], node.meta["val"]) == (before, value)
    assert node.meta["custom"] == {"lorac": QUERY}


def test_more_operands_join_those_that_are_there(graph: Graph) -> None:
    run_pipeline(graph, [InsertAdaptedCalls()])
    node = _call_of(graph, QUERY, ops.adapted)
    before = AdaptedCall.of(node)
    add_operands(node, {"down": before.x})
    after = AdaptedCall.of(node)
    assert after.operands == {**before.operands, "down": before.x}
    assert (after.op, after.host, after.site) == (before.op, before.host, before.site)
    assert list(node.all_input_nodes) == list(dict.fromkeys([*before.tensors, *after.operands.values()]))


@pytest.mark.medium("passes/test_fuse_projections.py: sites of one input are packed")
@pytest.mark.parametrize("stage", ["capture", "insert"])
def test_sites_by_the_input_they_read(stage: str, graph: Graph) -> None:
    seen: dict[str, list[list[str]]] = {}
    lower(graph, lambda name, graph: seen.update({name: list(group_sites_by_input(graph).values())}))
    read = {"capture": ["query", "key"], "insert": ["query|key"]}[stage]
    layers = [[[f"body.layers.{i}.{leaf}" for leaf in leaves] for leaves in (read, ["out"])] for i in range(3)]
    assert seen[stage] == [group for layer in layers for group in layer]
