"""Rows of a batch with adapters of their own at convolutions, in one call of the program."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.backends.onnxruntime.dialect import DIALECTS
from lorac.backends.tensorrt.dialect import DIALECT as TENSORRT
from lorac.ir.graph.passes import run_pipeline
from lorac.passes.pipelines import lowering_passes
from tests.captured import captured_program, graph_of
from tests.limits import LEAST_DIFFERENCE, ROWS
from tests.program_calls import note_calls

X = torch.randn(6, 5, 9, 11, generator=torch.Generator().manual_seed(0))


class Pixels(nn.Module):
    """Convolutions in one, two and three dimensions, with strides, dilations, groups, and borders that are mirrored."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(5, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 6, 3, padding="same", padding_mode="reflect", groups=2, bias=False)
        self.deep = nn.Conv3d(1, 3, (2, 1, 3), padding=(1, 0, 0))
        self.line = nn.Conv1d(21, 7, 2, padding=1, dilation=2)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(torch.relu(self.stem(x)))
        y = self.line(self.deep(y[:, None]).flatten(1, 2).flatten(2))
        scores: Tensor = self.head(torch.tanh(y).mean(-1))
        return scores


VARIANTS: dict[str, Any] = {
    "lora": lorac.LoRA(r=2, targets=["stem", "grouped", "deep", "line", "head"]),
    "wide": lorac.LoRA(r=5, targets=["stem", "line"]),
    "dora": lorac.DoRA(r=2, targets=["stem", "deep"]),
    "ia3": lorac.IA3(targets=["grouped", "line"], feedforward=[]),
    "short": lorac.DyLoRA(r=4, targets=["line"]),
}
CHOICES: tuple[Any, ...] = (
    None,
    *VARIANTS,
    {"lora": 0.6, "wide": -0.4, "dora": 0.3},
    {"short": lorac.Active(1.0, rank=1)},
)


def _compile(target: str) -> Any:
    torch.manual_seed(0)
    made = lorac.compile(Pixels().eval(), dict(VARIANTS), target=target, active=None, example_inputs=(X[:2],))
    with torch.no_grad():
        for name in sorted(made.adapters):
            for tensor in made.adapters[name].parameters():
                tensor.add_(0.3 * torch.randn(tensor.shape))
    return made


@pytest.fixture(scope="module", params=["onnxruntime", "eager"])
def compiled(request: pytest.FixtureRequest) -> Any:
    return _compile(request.param)


def _error(y: Tensor, ref: Tensor) -> float:
    return float((y - ref).abs().max() / ref.abs().max())


@pytest.mark.medium("passes/test_row_places.py, and rows of linear layers there", cases=["onnxruntime*"])
@torch.no_grad()
def test_every_choice_acts_and_takes_no_call_of_its_own(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, runs = compiled(X, adapters=None), list[str]()
    note_calls(monkeypatch, compiled.switch.state.bound, "run", lambda graph, _: runs.append(graph))
    for choice in CHOICES[1:]:
        assert _error(compiled(X, adapters=choice), base) > LEAST_DIFFERENCE, choice
    runs.clear()
    compiled(X, adapters=[*CHOICES[:5], None])
    assert runs == ["main"]


@pytest.mark.medium("passes/test_row_places.py, and rows of linear layers there", cases=["onnxruntime*"])
@torch.no_grad()
@pytest.mark.parametrize("count", [30, pytest.param(10_000, marks=pytest.mark.slow)])
def test_random_batches(compiled: Any, count: int) -> None:
    """A row's result is that of the row alone, whatever the other rows have."""
    drawn = random.Random(0)
    alone = {(repr(c), row): compiled(X[row : row + 1], adapters=c)[0] for c in CHOICES for row in range(len(X))}
    for _ in range(count):
        rows = [drawn.randrange(len(X)) for _ in range(drawn.randint(1, 9))]
        choices = [drawn.choice(CHOICES) for _ in rows]
        y = compiled(X[rows], adapters=choices)
        expected = torch.stack([alone[repr(choice), row] for row, choice in zip(rows, choices, strict=True)])
        assert _error(y, expected) < ROWS[y.dtype], (rows, choices)


@pytest.mark.medium("passes/test_row_places.py, and rows of linear layers there", cases=["onnxruntime*"])
@torch.no_grad()
def test_no_row_moves_anothers_bits(compiled: Any) -> None:
    choices = ["lora", "wide", None, "dora", "ia3", "short"]
    y = compiled(X, adapters=choices)
    other = compiled(X, adapters=[*choices[:2], "dora", *choices[3:]])
    assert torch.equal(y[[0, 1, 3, 4, 5]], other[[0, 1, 3, 4, 5]])
    assert not torch.equal(y[2], other[2])


@pytest.mark.medium("backends/tensorrt/test_engine.py: a rank above that of a convolution")
def test_tensorrt_explains_the_single_place_of_convolutions() -> None:
    host = Pixels().eval()
    eager = lorac.compile(host, {"a": lorac.LoRA(r=2, targets=["line"])})
    shapes = ({0: torch.export.Dim("batch")},)
    for dialect, placed in ((DIALECTS["cpu"], True), (TENSORRT, False)):
        graph = graph_of("main", captured_program(host, (X,), shapes), eager.sites, eager.plans)
        run_pipeline(graph, lowering_passes(dialect, rows=True))
        assert {slot.placed for slot in graph.slots.values()} == {placed}
        assert placed != any("a plan convolves all rows with one kernel" in note for note in graph.interface.notes)
