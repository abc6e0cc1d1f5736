"""The campaign of a scheduler, in short: every kind of client comes, and faults are detected."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from campaigns import serve, serve_http, tally
from lorac.runtime.generation.row_sampler import BatchSampler
from lorac.runtime.scheduling.running_row import RunningRow

pytestmark = pytest.mark.medium("test_soak.py, whose tally is the same")

KINDS = {"read", "left", "killed", "with a deadline", "lost its loop", "loaded again", "rows left", "bytes left"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> serve.Store:
    return serve.Store(tmp_path_factory.mktemp("store"), 6)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "CASES", 24)
    monkeypatch.setattr(serve, "CHANGING", 3)
    monkeypatch.setattr(serve, "CLIENTS", 12)


def test_nothing_goes_wrong(store: serve.Store) -> None:
    found = [serve.Load(store, rows=3, seed=0).run(80)]
    assert tally.wrong(found) == {}
    assert found[0]["count"].keys() >= KINDS
    assert "untyped errors 0, hangs 0" in tally.report(found)


@pytest.mark.slow
def test_nothing_goes_wrong_over_http(store: serve.Store) -> None:
    found = [serve_http.HttpLoad(store, rows=3, seed=0).run(150)]
    assert tally.wrong(found) == {}
    assert found[0]["count"].keys() >= {"read", "read as a stream", "left", "killed", "hurried", "hung up"}


def test_detects_wrong_tokens_and_rows_that_keep_adapters(store: serve.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens than the drawn ones, and rows that never let go of their adapters."""
    load, draw, kept = serve.Load(store, rows=3, seed=0), BatchSampler.draw, list[Any]()

    def other(sampler: BatchSampler, texts: Any, logits: torch.Tensor) -> torch.Tensor:
        return draw(sampler, texts, logits).clamp(max=serve.VOCABULARY - 2) + 1

    def end(row: RunningRow, reason: str, error: Exception | None = None) -> None:
        kept.append(row)
        row.stream.end(reason, error)

    monkeypatch.setattr(BatchSampler, "draw", other)
    monkeypatch.setattr(RunningRow, "end", end)
    bad = tally.wrong([load.run(12)])
    assert bad["wrong read"] and bad["wrong bytes left"]
