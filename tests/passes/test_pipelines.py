"""The pipeline: what each pass changes, that it says so truthfully, and that a second run changes nothing."""

from __future__ import annotations

import pytest

import lorac
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.view.dump import dump
from lorac.ir.view.printer import diff_dumps, to_text
from lorac.passes.pack import pack
from lorac.passes.pipelines import adapt, run_pipeline
from tests import goldens
from tests.captured import capture, captured_stack, lower


def _mixed() -> Graph:
    """Low-rank, scaled low-rank, a bound weight and a site left bare, on three equal blocks."""
    return captured_stack(
        {
            "style": lorac.DoRA(r=3, targets=["query"]),
            "task": lorac.LoRA(r=2, targets=["query", "key"]),
            "patch": lorac.SHiRA(r=1, targets=["out"]),
        }
    )


def test_golden_of_what_each_pass_changes() -> None:
    graph = _mixed()
    before, steps = dump(graph), []
    for name, step in adapt():
        changed = step(graph)
        after = dump(graph)
        steps.append(f"{name}: {'changed' if changed else 'no change'}\n{diff_dumps(before, after)}")
        before = after
    goldens.check("passes", "\n".join(steps))


def test_golden_of_the_result() -> None:
    graph = _mixed()
    lower(graph)
    goldens.check("passes_result", to_text(dump(graph)))


@pytest.mark.parametrize("name", ["plain_mlp", "plain_conv", "tiny_albert"])
def test_a_second_run_reports_no_change_and_makes_none(name: str) -> None:
    it = capture(name)
    assert lower(it.graph)
    before = dump(it.graph)
    assert lower(it.graph) == []
    assert dump(it.graph) == before


def test_each_pass_is_idempotent_where_it_stands() -> None:
    graph = _mixed()
    for name, step in adapt():
        step(graph)
        before = dump(graph)
        assert step(graph) is False, f"'{name}' reports a change on its own result"
        assert dump(graph) == before, f"'{name}' changes its own result"


def test_a_pass_that_reports_no_change_makes_none() -> None:
    """On a graph without adapters nothing is inserted, packed or read."""
    graph = captured_stack()
    for name, step in adapt():
        level, before = graph.level, [(n.name, n.target) for n in graph.fx.nodes]
        if not step(graph):
            assert (graph.level, [(n.name, n.target) for n in graph.fx.nodes]) == (level, before), name
    assert graph.level is Level.EXPANDED
    assert graph.slots == {}


def test_observers_see_the_capture_and_every_pass_that_changed_something() -> None:
    graph, seen = _mixed(), []
    changed = run_pipeline(graph, adapt(), lambda name, graph: seen.append((name, graph.level)))
    assert [name for name, _ in seen] == ["capture", *changed]
    assert [level for _, level in seen] == sorted(level for _, level in seen)


# Near misses: where a pass leaves things alone


def test_pack_needs_two_sites_with_a_rank_on_one_input() -> None:
    alone = captured_stack({"one": lorac.LoRA(r=2, targets=["query", "out"])})
    assert pack(alone) is False
    bound = captured_stack({"one": lorac.SHiRA(r=1, targets=["query", "key"])})
    assert pack(bound) is False, "a bound weight has no A to share"
    both = captured_stack({"one": lorac.LoRA(r=2, targets=["query", "key"])})
    assert pack(both) is True
    assert [group.sites for group in both.packs.values()] == [
        (f"body.layers.{i}.query", f"body.layers.{i}.key") for i in range(3)
    ]


def test_pack_joins_the_calls_of_a_shared_layer() -> None:
    it = capture("tiny_albert", {"one": lorac.LoRA(r=2, targets=["query", "value"])})
    assert pack(it.graph) is True
    (group,) = it.graph.packs.values()
    assert [path.rpartition(".")[2] for path in group.sites] == ["query", "value"]


def test_plans_say_why_a_weight_is_bound() -> None:
    plans = _mixed().plans
    assert plans["body.layers.0.query"].reasons == ()
    assert plans["body.layers.0.out"].reasons == ("bound weight: 'patch' is sparse",)
