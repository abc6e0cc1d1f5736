"""A short run of the campaign that compares ``lorac check`` with ``lorac.compile``."""

from __future__ import annotations

from pathlib import Path

import pytest

from campaigns import fit, sound


@pytest.mark.medium("session/test_adapter_check.py")
def test_check_exits_with_0_exactly_where_compile_accepts(tmp_path: Path) -> None:
    sound.write(tmp_path, quick=True, artifacts=False)
    outcomes, wrong = fit.compare_files(tmp_path, 24, seed=0)
    assert wrong == []
    assert min(outcomes["taken"], outcomes["refused"]) >= 5
