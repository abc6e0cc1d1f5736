"""Where lorac is installed without its extra ``onnxruntime``, a test that misses a library is skipped, with its name.

Elsewhere a library that is missing is a failure. That files, eager mode and training need no extra is tested in every
environment, by ``tests/architecture/test_import.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Generator

import pytest

from lorac import MissingExtra
from lorac.errors import EXTRAS

IS_BARE = importlib.util.find_spec("onnxruntime") is None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, object]:
    """Skip a file whose imports miss a library."""
    report = yield
    return _skip(report, report.call.excinfo, str(collector.path))  # type: ignore[attr-defined]  # as pytest reads it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, object]:
    """Skip a test that misses a library."""
    report = yield
    return _skip(report, call.excinfo, str(item.path))


def _skip(
    report: pytest.TestReport | pytest.CollectReport, raised: pytest.ExceptionInfo[BaseException] | None, path: str
) -> object:
    error = raised.value if IS_BARE and raised is not None else None
    while error is not None and not _names_missing_library(error):
        error = error.__cause__ or error.__context__  # a test may expect another error
    if error is not None:
        report.outcome, report.longrepr = "skipped", (path, 0, f"Skipped: {str(error).partition(chr(10))[0]}")
    return report


def _names_missing_library(error: BaseException) -> bool:
    if isinstance(error, MissingExtra):
        return error.what.partition(" ")[0] in EXTRAS
    return isinstance(error, ImportError) and (error.name or "lorac").partition(".")[0] != "lorac"
