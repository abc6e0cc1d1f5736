"""The campaign against files, in short; it finds the faults that it looks for."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from campaigns import fuzz, mutations, native_calls, op_calls, sound
from lorac.formats import formats
from lorac.formats.peft.config import peft_types
from tests.native.library import PACKAGE, build_package, needs_compiler

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it forks, and reads its memory from /proc")
ROOT = Path(__file__).parents[2]


@pytest.mark.medium("test_a_fault_is_found and test_a_case_can_be_repeated run cases of the campaign in this process")
def test_in_short() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "campaigns.fuzz", "--mutations", "24", "--seed", "7", "--quick"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 cases of seed 7" in done.stdout
    assert "found 0" in done.stdout


def test_every_format_and_method_has_a_sample() -> None:
    """A new one is damaged, too: what has no sample fails here."""
    assert {name for name, format in formats().items() if type(format).__module__.startswith("lorac.")} == sound.FORMATS
    for name in _built_in():
        variant, host = sound.configured(name)
        assert host.admits(variant) or not variant.acts_at_sites


def _built_in() -> set[str]:
    return {name for name, method in lorac.variants().items() if method.__module__.startswith("lorac.variants.")}


@pytest.mark.medium("test_every_format_and_method_has_a_sample")
def test_everything_has_a_sound_file(tmp_path: Path) -> None:
    """All samples are written and read again, and every type of PEFT is among them."""
    built_in = _built_in()
    sound.write(tmp_path, artifacts=False, methods=sorted(built_in))
    written = sound.read(tmp_path)
    assert {one.what for one in written if one.kind == "native"} == built_in
    configurations = [tmp_path / one.place / "adapter_config.json" for one in written if one.kind == "peft"]
    known = {name for current, one in peft_types().items() for name in (current, *one.former_names)}
    assert {json.loads(path.read_text())["peft_type"] for path in configurations} == known
    fuzz.Campaign(0, tmp_path).check()


def test_damages_a_file_of_one_tensor() -> None:
    whole = io.BytesIO()
    torch.save(torch.ones(3), whole)
    assert all(mutations.pickled(whole.getvalue(), random.Random(seed)) for seed in (0, 1, 3, 4, 5))


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Campaign:
    folder = tmp_path_factory.mktemp("fuzz")
    sound.write(folder, quick=True, artifacts=False)
    made = fuzz.Campaign(3, folder)
    made.check()
    return made


def test_a_case_can_be_repeated(campaign: fuzz.Campaign, tmp_path: Path) -> None:
    for index in range(30):
        folders = [tmp_path / f"{index}-{turn}" for turn in range(2)]
        for folder in folders:
            folder.mkdir()
            campaign.prepared(index, folder)
        files = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in folders]
        assert files[0] == files[1]
        for name in files[0]:
            one, other = (folder / name for folder in folders)
            # A zip file has the time at which it was written in it.
            skipped = not one.is_file() or one.is_symlink() or name.suffix == ".bin"
            assert skipped or one.read_bytes() == other.read_bytes(), name


def _crash(*args: Any) -> None:
    raise ValueError("untyped")


def _hoard(*args: Any) -> None:
    b"x" * (400 << 20)


@pytest.mark.parametrize(("fault", "outcome"), [(_crash, "ValueError in"), (_hoard, "takes memory")])
def test_a_fault_is_found(
    campaign: fuzz.Campaign, fault: Callable[..., None], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lorac, "load_adapter", fault)
    monkeypatch.setattr(lorac, "load", fault)
    result = fuzz.Campaign(3, campaign.folder, ["native"]).run(1)
    assert result.found
    assert outcome in result.outcome


@pytest.mark.medium("test_a_fault_is_found")
def test_a_process_that_ends_or_hangs_is_found(campaign: fuzz.Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases after it are run all the same."""

    def run(index: int) -> fuzz.Result:
        if index == 1:
            os._exit(9)
        while index == 3:
            pass
        return fuzz.Result(index, "native", "lora", "loads")

    monkeypatch.setattr(campaign, "run", run)
    monkeypatch.setattr(fuzz, "HANGS_AFTER", 1.0)
    found = {result.index: result.outcome for result in fuzz.results(campaign, range(6), workers=2)}
    assert found == {0: "loads", 1: "ends the process (9)", 2: "loads", 3: "hangs", 4: "loads", 5: "loads"}


def test_calls_ops_with_hostile_operands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_calls, "CALLS", 40)
    op_calls.run(random.Random(0), tmp_path)
    assert (tmp_path / op_calls.LATEST).read_text().startswith("39 ")
    monkeypatch.setattr(op_calls, "LONGEST", -1.0)
    with pytest.raises(RuntimeError, match="0 s: 0 "):
        op_calls.run(random.Random(0), tmp_path)
    monkeypatch.setattr(op_calls, "LONGEST", 5.0)
    monkeypatch.setattr(op_calls, "_call", lambda *_: os._exit(3))
    calls = fuzz.Campaign.__new__(fuzz.Campaign)
    calls.seed, calls.folder, calls.kinds = 0, tmp_path, ["ops"]
    assert [(r.outcome, r.found) for r in fuzz.results(calls, range(1), workers=1)] == [("ends the process (3)", True)]
    assert "aten" in next(tmp_path.glob(f"0-*/{op_calls.LATEST}")).read_text()


def test_every_sound_call_answers() -> None:
    answered, called = {"div", "linalg_solve_triangular"}, set()  # they take operands by name
    for op, make in op_calls._sound_calls():
        called.add(op._opname)
        with contextlib.suppress(RuntimeError):  # another overload's operands
            op_calls.guard_op(op)(*make())
            answered.add(op._opname)
    assert called <= answered


@needs_compiler
def test_runs_malformed_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_calls, "find_library", lambda: str(build_package() / PACKAGE / "liblorac_native.so"))
    native_calls.run(random.Random(0), tmp_path)
    assert "widths=" in (tmp_path / op_calls.LATEST).read_text()
