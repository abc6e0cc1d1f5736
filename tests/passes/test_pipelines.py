"""The pipeline: each pass's changes, reported skips and level, and a second run."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

import lorac
from lorac.ir.graph.graph import Graph, Level, Skip
from lorac.ir.graph.passes import Pass, PassResult, run_pipeline
from lorac.ir.slots.plans import Reason
from lorac.passes.expand import ExpandAdaptedCalls
from lorac.passes.fuse_projections import FuseProjections
from lorac.passes.insert import InsertAdaptedCalls
from lorac.passes.pipelines import Cleanup, lowering_passes
from lorac.report.dump import dump
from lorac.report.printer import diff_dumps, to_text
from tests import goldens
from tests.captured import capture, captured_program, captured_stack, graph_of, lower
from tests.refusing import refuses


def _mixed() -> Graph:
    """Low-rank, scaled low-rank, a bound weight and a site left bare, on three equal blocks."""
    return captured_stack(
        {
            "style": lorac.DoRA(r=3, targets=["query"]),
            "task": lorac.LoRA(r=2, targets=["query", "key"]),
            "patch": lorac.SHiRA(r=1, targets=["out"]),
        }
    )


def _run(graph: Graph, step: Pass) -> PassResult:
    """One pass by itself."""
    ((_, outcome),) = run_pipeline(graph, [step])
    return outcome


def test_changes_of_every_pass_equal_the_golden_file() -> None:
    graph = _mixed()
    before, steps = dump(graph), []
    for step in lowering_passes():
        changed = _run(graph, step).changed
        after = dump(graph)
        steps.append(f"{step.name}: {'changed' if changed else 'no change'}\n{diff_dumps(before, after)}")
        before = after
    goldens.check("passes", "\n".join(steps))


def test_golden_of_the_result() -> None:
    graph = _mixed()
    lower(graph)
    goldens.check("passes_result", to_text(dump(graph)))


@pytest.mark.medium("test_every_pass_is_idempotent; a plain model")
@pytest.mark.slow("plain models", cases=["tiny_albert"])
@pytest.mark.parametrize("name", ["plain_mlp", "plain_conv", "tiny_albert"])
def test_a_second_run_reports_no_change_and_makes_none(name: str) -> None:
    it = capture(name)
    assert lower(it.graph)
    before = dump(it.graph)
    assert lower(it.graph) == []
    assert dump(it.graph) == before


@pytest.mark.parametrize("step", lowering_passes(), ids=lambda step: step.name)
def test_every_pass_is_idempotent(step: Pass) -> None:
    """One that stays on its level may run again and changes nothing; one that leaves it is refused."""
    graph = _mixed()
    for earlier in lowering_passes()[: lowering_passes().index(step) + 1]:
        _run(graph, earlier)
    before = dump(graph)
    if step.reads is step.leaves:
        assert not _run(graph, step).changed, "it reports a change on its own result"
    else:
        with refuses("wrong_level", match="it has run already"):
            _run(graph, step)
    assert dump(graph) == before, "it changes its own result"


@pytest.mark.medium("passes in the wrong order are refused")
def test_a_second_run_skips_the_finished_passes() -> None:
    graph = _mixed()
    lower(graph)
    outcomes = run_pipeline(graph, lowering_passes())
    behind = PassResult(changed=False, skipped=(Skip("stack", "the graph is at level expanded already"),))
    assert outcomes[:-2] == [(name, behind) for name in ("fuse_projections", "insert", "values", "expand")]
    assert outcomes[-2:] == [(name, PassResult(changed=False)) for name in ("cache", "cleanup")]


def test_a_pass_that_reports_no_change_makes_none() -> None:
    """On a graph without adapters nothing is inserted, packed or read."""
    graph = captured_stack()
    for step in lowering_passes():
        level, before = graph.level, [(n.name, n.target) for n in graph.fx.nodes]
        if not _run(graph, step).changed:
            assert (graph.level, [(n.name, n.target) for n in graph.fx.nodes]) == (level, before), step.name
    assert graph.level is Level.EXPANDED
    assert graph.slots == {}


@pytest.mark.medium("report/test_printer.py prints each pass's graph")
def test_observers_see_the_capture_and_every_pass_that_changed_something() -> None:
    graph, seen = _mixed(), []
    changed = lower(graph, lambda name, graph: seen.append((name, graph.level)))
    assert [name for name, _ in seen] == ["capture", *changed]
    assert [level for _, level in seen] == sorted(level for _, level in seen)


# The levels


@pytest.mark.medium("two of the orders", keep=["expand-insert-*", "insert-insert-*"])
@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            [ExpandAdaptedCalls(), InsertAdaptedCalls()],
            "'expand' reads level adapted, but graph 'stack' is at level host\n  run 'insert' before",
        ),
        (
            [FuseProjections(), Cleanup()],
            "'cleanup' reads level expanded, .* host\n  run passes that lead from level host to level expanded",
        ),
        (
            [InsertAdaptedCalls(), FuseProjections()],
            "'fuse_projections' reads level host, .* adapted\n  run it before 'insert'",
        ),
        ([InsertAdaptedCalls(), InsertAdaptedCalls()], "'insert' reads level host, .* adapted\n  it has run already"),
    ],
    ids=lambda given: "-".join(step.name for step in given) if isinstance(given, list) else "",
)
def test_rejects_passes_in_the_wrong_order(passes: list[Pass], message: str) -> None:
    with refuses("wrong_level", match=message):
        run_pipeline(_mixed(), passes)


def test_a_rejected_pass_leaves_the_graph_unchanged() -> None:
    graph = _mixed()
    before = dump(graph)
    with refuses("wrong_level"):
        _run(graph, ExpandAdaptedCalls())
    assert dump(graph) == before


@pytest.mark.parametrize("step", lowering_passes(), ids=lambda step: step.name)
def test_a_pass_is_a_value(step: Pass) -> None:
    assert step == type(step)()
    with pytest.raises(FrozenInstanceError):
        step.name = "other"


# Near misses: where a pass leaves things alone, and why


def test_insert_reports_sites_that_are_never_called() -> None:
    class Host(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    host, inputs = Host(), (torch.randn(3, 4),)
    compiled = lorac.compile(host, {"one": lorac.LoRA(r=2)})
    graph = graph_of("host", captured_program(host, inputs), compiled.sites, compiled.plans)
    assert _run(graph, InsertAdaptedCalls()) == PassResult(
        True, (Skip("idle", "no output of the graph depends on it"),)
    )
    assert list(graph.plans) == ["used"]


def test_expand_reports_extra_outputs_without_a_source() -> None:
    graph = _mixed()
    outcomes = dict(run_pipeline(graph, lowering_passes(aux=("router",))))
    assert outcomes["expand"].skipped == (Skip("router", "no branch at a site of this graph emits it"),)
    assert graph.interface.extra_outputs == ()


def test_plans_give_the_reason_for_a_bound_weight() -> None:
    plans = _mixed().plans
    assert plans["body.layers.0.query"].reasons == ()
    assert plans["body.layers.0.out"].reasons == (
        Reason("patch", "body.layers.0.out", "is sparse and so needs a merged weight"),
    )


@pytest.mark.medium("the interpreter's comparisons with eager mode")
def test_values_have_the_rank_of_their_own_site() -> None:
    """A trace serves several sites, each of whose ranks may be another."""
    it = capture("tiny_llama")
    lower(it.graph)
    slots = {slot.node for slot in it.graph.slots.values()}
    products = [n for n in it.graph.fx.nodes if n.op == "call_function" and getattr(n.args[-1], "name", "") in slots]
    widths = [(str(n.meta["val"].shape[-1]), str(n.args[-1].meta["val"].shape[-1])) for n in products]
    assert len({width for width, _ in widths}) > len(it.graph.projections) > 1
    assert all(found == wanted for found, wanted in widths)
