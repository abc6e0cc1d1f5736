"""The passes of a capture: their changes, their reported skips, and a second run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from lorac.frontend.capture import export
from lorac.frontend.capture.export import capture_graph
from lorac.frontend.capture.pipeline import capture_passes
from lorac.frontend.capture.written_attention import FoldWrittenAttention
from lorac.frontend.host import Host
from lorac.frontend.site_discovery import find_sites
from lorac.ir.graph.graph import Graph, Level, Skip
from lorac.ir.graph.passes import Pass, PassResult, run_pipeline
from tests.captured import Stack
from tests.decoders import DECODERS
from tests.encoder_decoders import made
from tests.refusing import refuses

X = (torch.randn(2, 5, 10),)


class Branching(nn.Module):
    """Three equal layers, one of two branches, and a size among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack()

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        y = self.stack(x)
        return torch.cond(x.sum() > 0, lambda v: (v + 1,), lambda v: (v - 1,), (y,))[0], x.shape[0]


def _capture(model: nn.Module, inputs: object = None, *, grows: bool = False) -> tuple[Graph, list[tuple[str, Level]]]:
    """Return the graph of a model, and the stages of its capture."""
    stages: list[tuple[str, Level]] = []

    def observe(stage: str, graph: Graph) -> None:
        stages.append((stage, graph.level))

    options = {"sites": find_sites(model), "plans": {}, "grows": grows, "observe": observe}
    return capture_graph("main", Host.of(model), inputs, None, **options), stages


def test_each_pass_that_changes_the_graph_is_a_stage() -> None:
    graph, stages = _capture(Branching(), X)
    assert [name for name, _ in stages] == ["trace", "inline", "layers", "outputs", "names"]
    assert [level for _, level in stages] == [Level.TRACED] * 4 + [Level.HOST]
    assert graph.level is Level.HOST and graph.skips == {}


@pytest.mark.parametrize(
    ("make", "changing"),
    [
        (Branching, {"inline", "layers", "outputs"}),
        (DECODERS["falcon"], {"layers", "attention", "check_attention"}),
        (lambda: made("bart"), {"check_attention", "positions"}),
        (lambda: made("t5"), {"check_attention"}),
    ],
    ids=["branching", "falcon", "bart", "t5"],
)
def test_a_second_run_reports_no_change_and_makes_none(
    make: Callable[[], nn.Module], changing: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = set[str]()

    def run_twice(graph: Graph, passes: Sequence[Pass], _: object, *, first: str) -> None:
        for step in passes:
            before = _nodes(graph)
            ((_, result),) = run_pipeline(graph, [step], first=first)
            if step.leaves is not step.reads:
                continue
            changed.update([step.name] if result.changed else [])
            after = _nodes(graph)
            assert result.changed or before == after, step.name
            assert run_pipeline(graph, [step]) == [(step.name, PassResult(False, result.skipped))]
            assert _nodes(graph) == after, step.name

    monkeypatch.setattr(export, "run_pipeline", run_twice)
    model = make()
    _capture(model, X if isinstance(model, Branching) else None, grows=not isinstance(model, Branching))
    assert changed == changing


def _nodes(graph: Graph) -> list[tuple[object, ...]]:
    return [(node, node.name, node.target, node.args, node.kwargs) for node in graph.fx.nodes]


def test_positions_reports_the_numberings_that_it_leaves() -> None:
    graph, _ = _capture(made("t5"), grows=True)
    assert {skip.why for skip in graph.skips["positions"]} == {"biases of attention are computed from it"}


def test_attention_reports_the_softmax_that_it_leaves() -> None:
    """This family adds its biases by distance to the scores and to the mask."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    graphs: list[Graph] = []

    class Keep(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:

        def keep(graph: Graph, *_: object, **__: object) -> None:
            graphs.append(graph)
            raise Keep

        patch.setattr(export, "run_pipeline", keep)
        with pytest.raises(Keep):
            _capture(FalconForCausalLM(config).eval(), grows=True)
    ((_, result),) = run_pipeline(graphs[0], [FoldWrittenAttention()], first="trace")
    assert not result.changed
    assert {skip.why for skip in result.skipped} == {"its scores are no product with a mask"}


def test_a_captured_graph_is_not_captured_again() -> None:
    graph, _ = _capture(Stack(), X)
    with refuses("wrong_level", match="'inline' reads level traced, but graph 'main' is at level host"):
        run_pipeline(graph, capture_passes())


def test_leaves_a_loop_without_layers() -> None:
    class Looping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            from torch._higher_order_ops.map import map as over_rows

            return self.out(over_rows(lambda row: row * 2, x))

    graph, _ = _capture(Looping(), X)
    assert [skip.why for skip in graph.skips["inline"]] == ["no layer is called in it"]
    assert graph.skips["inline"][0] == Skip(graph.skips["inline"][0].where, "no layer is called in it")
