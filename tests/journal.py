"""Parts of a long run, and a journal of passed tests, so that the run can be stopped and resumed.

``pytest --part=3/8`` runs every eighth of the small groups of tests from the third on. ``--journal=FOLDER`` skips the
tests that the journal of this commit says passed, adds what passes or fails now, and says at the end how far the whole
run is. Both take ``=``: pytest looks for its configuration before it knows these options, and would take a folder
behind a space for a test's.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOGETHER = 12
"""So many tests that follow one another are in one part: they share what the fixtures of their module build."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("journal")
    group.addoption("--part", default="1/1", metavar="K/N", help="run every N-th group of tests from the K-th on")
    group.addoption("--journal", type=Path, metavar="FOLDER", help="where to note what passed, and to read it from")


def pytest_configure(config: pytest.Config) -> None:
    part, parts = map(int, config.getoption("part").split("/"))
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--part {part}/{parts}: there are parts 1 to {parts}")
    folder = config.getoption("journal")
    # A worker gets what had passed when the run began, since all workers must collect the same tests.
    given = getattr(config, "workerinput", {}).get("passed")
    file = folder / f"{read_commit()}.txt" if folder and given is None else None
    passed = set(given or (read_journal(file)["passed"] if file else ()))
    config.pluginmanager.register(Journal(part, parts, passed, file), "lorac-journal")


def read_commit() -> str:
    """Return what git calls the sources, with a mark where they differ from the commit."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def read_journal(file: Path) -> dict[str, set[str]]:
    """Return outcome -> the tests that had it last."""
    lines = file.read_text().splitlines() if file.exists() else []
    outcomes = {test: outcome for outcome, _, test in (line.split(" ", 2) for line in lines)}
    return {kind: {test for test, each in outcomes.items() if each == kind} for kind in ("passed", "failed")}


class Journal:
    """The tests that a run leaves out, and the file that receives each test's outcome and seconds."""

    def __init__(self, part: int, parts: int, passed: set[str], file: Path | None) -> None:
        self.part, self.parts, self.passed, self.file = part, parts, passed, file
        self.seconds: Counter[str] = Counter()
        self.failed: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep this part's tests that have not passed yet; it runs after the markers' selection."""
        own = [item for i, item in enumerate(items) if i // TOGETHER % self.parts == self.part - 1]
        kept = [item for item in own if item.nodeid not in self.passed]
        left = set(items) - set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = kept

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: object) -> None:
        """Give a worker of xdist what had passed."""
        node.workerinput["passed"] = sorted(self.passed)  # type: ignore[attr-defined]  # xdist's own class

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test's outcome once it has been torn down; a worker leaves that to the main process."""
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)
        if report.when != "teardown" or self.file is None:
            return
        outcome = "failed" if report.nodeid in self.failed else "passed"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as journal:
            journal.write(f"{outcome} {self.seconds[report.nodeid]:.2f} {report.nodeid}\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how far the whole run is."""
        if self.file is None:
            return
        outcomes = read_journal(self.file)
        terminalreporter.write_line(
            f"{self.file}: {len(outcomes['passed'])} passed and {len(outcomes['failed'])} failed of this commit so far"
        )
