"""The stages of a graph: recorded while passes run, dumped when they are read."""

from __future__ import annotations

import pytest

import lorac
from lorac.report import dump as dumps
from lorac.report.dump import Dump, dump
from lorac.report.pass_history import PassHistory
from tests.captured import capture, lower
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ["plain_mlp", "tiny_albert"])
def test_returns_each_stage_as_recorded(name: str) -> None:
    graph, history, expected = capture(name).graph, PassHistory(), dict[str, Dump]()

    def observe(stage: str, _: object) -> None:
        history.record(stage, graph)
        expected[stage] = dump(graph)

    lower(graph, observe)
    assert list(history.stages) == ["main"]
    assert dict(history.stages["main"]) == expected
    assert len(expected) > 2


def test_a_compile_dumps_nothing_until_a_stage_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    of = dumps.GraphRecord.dump
    monkeypatch.setattr(dumps.GraphRecord, "dump", lambda self: made.append(self.name) or of(self))
    entry = ZOO["plain_mlp"]
    compiled = lorac.compile(
        entry.model(), {"a": lorac.LoRA(r=2, targets=["up"])}, target="onnxruntime", example_inputs=entry.inputs()
    )
    assert made == []
    assert "up" in str(compiled.graph)
    assert made
