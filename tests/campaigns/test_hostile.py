"""The campaign of hostile tenants, in short: each attack is made, and the victim is answered."""

from __future__ import annotations

import re

import pytest

from campaigns import hostile


@pytest.mark.slow("serving/test_tenants.py has each bound by itself")
def test_measures_a_victim_next_to_each_attack(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostile, "MOST_TIMES", 100.0)  # few requests on a busy machine
    monkeypatch.setattr(hostile, "_TURNS", 1)
    hostile.main(["--requests", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r"\s{2,}", line)[0] for line in lines[1:]] == [*hostile.ATTACKS]
    assert all(re.search(r"; 0; {", line) for line in lines[1:])
