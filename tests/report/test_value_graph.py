"""The graph of values for networkx: what its nodes and edges say, and questions about it."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import lorac


class Branches(nn.Module):
    """Two layers of which the second reads the first, and a third that reads the input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.aside = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (batch, 4) and (batch, 5)."""
        return self.second(torch.relu(self.first(x))), self.aside(x)


@pytest.fixture(scope="module")
def compiled() -> lorac.Compiled:
    """The model with a LoRA on its first and its third layer."""
    torch.manual_seed(0)
    adapters = {"a": lorac.LoRA(r=2, targets=["first", "aside"])}
    return lorac.compile(Branches(), adapters, example_inputs=(torch.ones(3, 6),))


@pytest.fixture(scope="module")
def graph(compiled: lorac.Compiled) -> nx.DiGraph:
    return compiled.graph.to_networkx()


def test_nodes_have_site_slot_op_shape_and_source(graph: nx.DiGraph) -> None:
    assert graph.nodes["x"] == {"kind": "in", "shape": "f32[b, 6]"}
    assert graph.nodes["first.weight"] == {"kind": "weight", "shape": "f32[8, 6]"}
    slot = graph.nodes["first:a"]
    assert slot == {"kind": "slot", "shape": slot["shape"], "slot": "a", "site": "first"}
    linear = graph.nodes["second"]
    line = Branches.forward.__code__.co_firstlineno + 2
    assert linear == {
        "kind": "value",
        "op": linear["op"],
        "shape": "f32[b, 4]",
        "source": f"{Path(__file__).name}:{line}",
        **({"site": "second"} if "site" in linear else {}),
    }
    assert "linear" in linear["op"]
    assert [kind for _, kind in graph.nodes(data="kind")].count("out") == 2


def test_edges_have_the_value_that_they_carry(graph: nx.DiGraph) -> None:
    for one, _, value in graph.edges(data="value"):
        assert value == graph.nodes[one].get("shape", "")
    assert {value for _, _, value in graph.out_edges("x", data="value")} == {"f32[b, 6]"}


def test_only_values_have_an_op(graph: nx.DiGraph) -> None:
    assert {kind for name, kind in graph.nodes(data="kind") if graph.nodes[name].get("op")} == {"value"}


def test_finds_the_outputs_that_a_slot_reaches(graph: nx.DiGraph) -> None:
    outputs = [name for name, kind in graph.nodes(data="kind") if kind == "out"]
    reached = {slot: [name in nx.descendants(graph, slot) for name in outputs] for slot in ("first:b", "aside:b")}
    assert reached == {"first:b": [True, False], "aside:b": [False, True]}
    assert "second.weight" in nx.ancestors(graph, outputs[0]) - nx.ancestors(graph, outputs[1])
    order = list(nx.topological_sort(graph))
    assert order.index("first") < order.index("second")


@pytest.mark.parametrize("stage", ["capture", "insert", "expand"])
def test_every_stage_has_all_weights_and_its_slots(compiled: lorac.Compiled, stage: str) -> None:
    view = compiled.graph["main"].after(stage)
    graph = view.to_networkx()
    kinds = {name: kind for name, kind in graph.nodes(data="kind")}
    assert {name for name, kind in kinds.items() if kind == "weight"} == set(dict(Branches().named_parameters()))
    assert {name for name, kind in kinds.items() if kind == "slot"} == set(view.dump.slots)
    assert len([name for name, kind in kinds.items() if kind in {"in", "value", "out"}]) == len(view.dump.rows)
    assert nx.is_directed_acyclic_graph(graph)


@pytest.mark.medium("test_every_stage_has_all_weights_and_its_slots")
def test_an_emitted_program_and_a_module_of_it(compiled: lorac.Compiled) -> None:
    engine = compiled.export("onnxruntime", mode="live")
    graph = engine.graph["main"].emitted.to_networkx()
    slots = {name: site for name, site in graph.nodes(data="site") if graph.nodes[name]["kind"] == "slot"}
    assert set(slots) == set(engine.graph["main"].dump.slots) and set(slots.values()) == {"first", "aside"}
    inside = engine.graph["main"].at("first").to_networkx()
    assert "first:a" in inside and "aside:a" not in inside and "second" not in inside


def test_names_of_several_graphs_begin_with_their_graph(tmp_path: Path) -> None:
    one, other = (
        lorac.compile(nn.Sequential(nn.Linear(2, 2)), {}, example_inputs=(torch.ones(2, 2),)).graph for _ in range(2)
    )
    both = type(one)({"main": one["main"], "encoder": other["main"]}, one._context)
    graph = both.to_networkx()
    assert {"main:output", "encoder:output"} <= set(graph)
    assert nx.number_weakly_connected_components(graph) == 2
    nx.write_graphml(graph, tmp_path / "graph.graphml")
    assert set(nx.read_graphml(tmp_path / "graph.graphml")) == set(graph)


def test_a_value_with_the_name_of_another_is_a_node_of_its_own() -> None:
    from lorac.report.dump import Dump, Row
    from lorac.report.graph_views import to_networkx

    first = Row("value", "norm", "relu \x00", (0,), "t", blocks=("layer",), stored={"layer.norm": "f32[2]"})
    rows = (Row("in", "x", "", type="t"), first, Row("out", "", "\x00", (1,), "t"))
    graph = to_networkx(Dump("main", "host", rows))
    assert [name for name, kind in graph.nodes(data="kind") if kind == "value"] == ["layer.norm'"]
    assert set(graph.edges) == {("layer.norm", "layer.norm'"), ("x", "layer.norm'"), ("layer.norm'", "output")}
