"""The kill campaign runs as the command line has it; its mechanism is tested in ``tests/storage/test_killed.py``."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from campaigns import kill
from tests.storage.writers import start

ROOT = Path(__file__).parents[2]


def _fail(target: Path, number: int) -> None:
    raise RuntimeError("no version is written")


def _try_failing_writer(folder: Path) -> None:
    tally = kill.Tally("failing")
    writer = kill.Writer("failing", _fail, lambda target: 1)
    kill.at_every_step(writer, folder / "it", tally, exchange=False)
    (folder / "wrong.txt").write_text("\n".join(tally.wrong))


@pytest.mark.medium("storage/test_killed.py kills the same writers")
def test_a_writer_that_fails_is_reported_and_ends_the_steps(tmp_path: Path) -> None:
    process = start(_try_failing_writer, tmp_path)
    process.join(60)
    process.kill()
    assert "step 1: the writer ended with 1" in (tmp_path / "wrong.txt").read_text()


@pytest.mark.slow
def test_the_campaign(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "campaigns.kill", "--moments", "20", f"--json={tmp_path / 'found.json'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    tallies = json.loads((tmp_path / "found.json").read_text())
    in_openvino = ["compiled.save, openvino"] if importlib.util.find_spec("openvino") else []
    in_aoti = ["compiled.save, aoti"] if shutil.which("g++") else []
    wanted = ["compiled.save", *in_openvino, *in_aoti, "swap --save", "peft", "native"]
    assert [tally["writer"] for tally in tallies] == wanted
    for tally in tallies:
        assert tally["moments"] == 20
        assert tally["old"] > 0
        assert tally["new"] > 0
        assert tally["wrong"] == []
