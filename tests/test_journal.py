"""A run in parts, stopped and gone on with, of a suite made for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.journal import TOGETHER

ROOT = Path(__file__).parents[1]
SUITE = f"""
import pathlib
import pytest

@pytest.mark.parametrize("number", range({2 * TOGETHER}))
def test_it(number):
    assert number != {TOGETHER} or pathlib.Path("mended").exists()
"""


@pytest.fixture
def run(tmp_path):
    """Runs the suite with some options and returns how it ended and what it printed."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.journal"]')

    def run(*options):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--journal=journal", *options]
        done = subprocess.run(
            command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.medium("test_rejects_a_part_that_does_not_exist")
@pytest.mark.parametrize("workers", [(), pytest.param(("-n", "2"), marks=pytest.mark.slow)], ids=["alone", "workers"])
def test_parts_add_up_and_only_failed_tests_run_again(run, tmp_path, workers):
    code, printed = run("--part=1/2", *workers)
    assert code == 0 and f"{TOGETHER} passed and 0 failed of this commit so far" in printed
    code, printed = run("--part=2/2", *workers)
    assert code == 1 and f"{2 * TOGETHER - 1} passed and 1 failed of this commit so far" in printed
    (tmp_path / "mended").touch()
    code, printed = run(*workers)
    assert code == 0 and "1 passed" in printed
    assert f"{2 * TOGETHER} passed and 0 failed of this commit so far" in printed


def test_rejects_a_part_that_does_not_exist(run):
    code, printed = run("--part=3/2")
    assert code == 4 and "--part 3/2: there are parts 1 to 2" in printed
