"""The structure of dumps: repeated blocks, the graph of values."""

from __future__ import annotations

import networkx as nx
import pytest

import lorac
from lorac.ir.graph.graph import Graph
from lorac.report.dump import dump
from lorac.report.printer import AdapterNotes, SectionPrinter
from lorac.report.sections import build_sections, extract_module, find_runs, group_items
from tests.captured import capture, captured_stack, lower


def _runs(graph: Graph) -> list[tuple[str, int]]:
    """(first path, length) of the runs of outermost blocks."""
    lower(graph)
    found = dump(graph)
    body, root = SectionPrinter(found, AdapterNotes()), build_sections(found)
    groups = [part for part in group_items(root) if isinstance(part, list)]
    return [(blocks[start].call, length) for blocks in groups for start, length in body.runs(blocks)]


def test_groups_identical_layers() -> None:
    assert _runs(captured_stack()) == [("body.layers.0", 3)]
    everywhere = {"one": lorac.LoRA(r=2, targets=["query", "out"])}
    assert _runs(captured_stack(everywhere)) == [("body.layers.0", 3)]


def test_a_layer_that_differs_is_a_run_of_its_own() -> None:
    def of(layer: int) -> list[tuple[str, int]]:
        return _runs(captured_stack({"one": lorac.LoRA(r=2, targets=["query"], layers=[layer])}))

    assert of(1) == [("body.layers.0", 1), ("body.layers.1", 1), ("body.layers.2", 1)]
    assert of(0) == [("body.layers.0", 1), ("body.layers.1", 2)]


def test_a_first_layer_that_computes_more_differs() -> None:
    """As in T5, whose first layer computes the position bias that the others read."""
    assert _runs(captured_stack(first_differs=True)) == [("body.layers.0", 1), ("body.layers.1", 2)]


@pytest.mark.medium("test_groups_identical_layers")
def test_calls_of_a_shared_layer_are_blocks_of_their_own() -> None:
    assert _runs(capture("tiny_albert").graph) == [("albert.encoder.albert_layer_groups.0", 3)]


def test_groups_only_neighbours_of_one_list() -> None:
    assert find_runs([("a", "1"), ("a", "1"), ("b", "1"), ("b", "2"), ("a", "1")]) == [(0, 2), (2, 1), (3, 1), (4, 1)]


def test_values_form_an_acyclic_graph_from_inputs_to_outputs() -> None:
    graph = captured_stack({"all": lorac.LoRA(r=2)})
    lower(graph)
    found = dump(graph)
    flow = nx.DiGraph((ref, index) for index, row in enumerate(found.rows) for ref in row.refs)
    assert nx.is_directed_acyclic_graph(flow)
    (start,) = (i for i, row in enumerate(found.rows) if row.kind == "in")
    (end,) = (i for i, row in enumerate(found.rows) if row.kind == "out")
    assert nx.has_path(flow, start, end)
    adapted = [i for i, row in enumerate(found.rows) if row.site is not None]
    assert len(adapted) >= 9
    assert all(nx.has_path(flow, i, end) for i in adapted)


def test_extracting_a_module_keeps_only_its_inside() -> None:
    found = dump(captured_stack())
    inside, result = (extract_module(found, f"body.layers.1{leaf}") for leaf in ("", ".out"))
    assert inside is not None and result is not None
    assert set(inside.sites) == {f"body.layers.1.{leaf}" for leaf in ("query", "key", "out")}
    assert [row.name for row in inside.rows if row.site] == ["query", "key", "out"]
    assert [row.kind for row in inside.rows].count("in") == 1
    assert [row.kind for row in inside.rows].count("out") == 1
    assert [row.name for row in result.rows if row.kind == "value"] == ["out"]
    assert extract_module(found, "body.layers.9") is None
