"""The kill campaign runs as the command line has it; its mechanism is tested in ``tests/storage/test_killed.py``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_campaign(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "campaigns.kill", "--moments", "20", f"--json={tmp_path / 'found.json'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    tallies = json.loads((tmp_path / "found.json").read_text())
    assert [tally["writer"] for tally in tallies] == ["compiled.save", "swap --save", "peft", "native"]
    for tally in tallies:
        assert tally["moments"] == 20
        assert tally["old"] > 0
        assert tally["new"] > 0
        assert tally["wrong"] == []
