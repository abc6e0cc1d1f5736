"""Progress appears on a terminal once work has taken its time, and never elsewhere."""

import time

import pytest

from lorac import progress


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(progress, "DELAY_SECONDS", 0.05)


def test_a_terminal_sees_the_step(soon, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.progress("compiling", total=2) as report:
        report.step("capture")
        time.sleep(0.3)
        report.step("emission")
        assert report._bar is not None
        assert report._bar.tasks[0].completed == 1
        assert "emission" in report._bar.tasks[0].description


def test_prints_nothing_without_a_terminal(soon, capsys):
    with progress.progress("compiling") as report:
        report.step("capture")
        time.sleep(0.2)
    assert capsys.readouterr().err == ""
    assert report._bar is None


def test_silent_for_quick_work(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.progress("compiling") as report:
        report.step("capture")
    assert report._bar is None


def test_an_inner_block_reports_to_the_outer_bar(soon, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress.progress("compile") as report:
        progress.step("loading the model")
        time.sleep(0.3)
        with progress.progress("compiling for ONNX Runtime", total=4) as inner:
            inner.step("emission")
            assert "compile: compiling for ONNX Runtime, emission" in report._bar.tasks[0].description
            assert inner._bar is None
    progress.step("nobody listens")
