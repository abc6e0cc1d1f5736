"""The soak, in short: every kind of operation happens without a fault, and planted faults are detected."""

from __future__ import annotations

import signal
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from campaigns import soak, tally
from lorac.ir.slots.buffers import FusedBuffer

KINDS = {
    "addition", "removal", "save and load", "swap", "call", "call of its own choice", "failing swap", "interrupted",
}  # fmt: skip
BETWEEN_OPEN_AND_WITH = pytest.mark.filterwarnings("ignore:unclosed (file|scandir iterator):ResourceWarning")
"""An interrupt may come there. As an error the warning would keep the whole stack, and the adapters in use on it."""
pytestmark = BETWEEN_OPEN_AND_WITH


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(soak, "ROUND", 60)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # is pytest's again afterwards
    before, threads = signal.getsignal(signal.SIGALRM), torch.get_num_threads()
    soak.prepare_process()  # pytest's hook would keep the interrupt's stack, and the adapters in use on it
    yield
    signal.signal(signal.SIGALRM, before)
    torch.set_num_threads(threads)


@pytest.mark.medium(
    "test_detects_unwritten_weights_and_foreign_errors runs a round; runtime/test_swap.py swaps a hundred times"
)
@pytest.mark.usefixtures("small")
def test_nothing_goes_wrong(tmp_path: Path) -> None:
    run = soak.Soak(0, soak.make_models(["lora", "shira"], tmp_path))
    for model in run.models:
        run._round(model)
    assert {kind.partition(",")[0] for kind in run.count} >= KINDS
    found = [{"count": dict(run.count), "start": 0, "end": 0, "seconds": 1.0}]
    assert tally.wrong(found) == {}
    assert "untyped errors 0, hangs 0" in tally.report(found)


@pytest.mark.usefixtures("small")
def test_detects_unwritten_weights_and_foreign_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is not written, and an error that is none of lorac's."""
    monkeypatch.setattr(soak, "ENGINES", [("eager", "fused")])
    run = soak.Soak(0, soak.make_models(["lora", "shira"], tmp_path))
    monkeypatch.setattr(FusedBuffer, "_write", lambda *given: 0)
    monkeypatch.setattr(soak.Soak, "_add", _raise)
    run._round(run.models[0])
    bad = tally.wrong([{"count": dict(run.count), "start": 0, "end": 2 * tally.GROWTH, "seconds": 1.0}])
    assert any(kind.startswith("wrong swap") for kind in bad)
    assert any(kind.startswith("untyped KeyError") for kind in bad)
    assert "bytes grown" in bad


def _raise(*given: Any) -> None:
    raise KeyError("injected")


@pytest.mark.usefixtures("small")
def test_an_interrupt_in_a_finalizer_keeps_no_stack_alive() -> None:
    class Owner: ...

    def let_go() -> weakref.ref[Owner]:
        owner, in_use = Owner(), Owner()
        weakref.finalize(owner, interrupt)
        del owner
        return weakref.ref(in_use)

    def interrupt() -> None:
        raise soak.Interrupted

    assert let_go()() is None
