"""The cache of plans: found by their inputs, checked, and bounded."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import lorac
from lorac.backends.tensorrt import plan_cache as caching
from lorac.backends.tensorrt.device.requirements import check_plan
from lorac.backends.tensorrt.library import find_library
from lorac.backends.tensorrt.plan_cache import PlanCache, plan_key
from lorac.storage.open_file import OpenFile
from tests.backends.tensorrt import tiny
from tests.backends.tensorrt.machines import install_nvidias
from tests.backends.tensorrt.tiny import LIBRARY

KEY, OTHER = "0" * 32, "1" * 32


def _program(folder: Path, content: bytes | None = None) -> list[OpenFile]:
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(tiny.model().SerializeToString() if content is None else content)
    return [OpenFile(path)]


def test_a_plan_is_built_once(tmp_path: Path) -> None:
    built = []

    def build() -> bytes:
        built.append(tiny.plan())
        return built[-1]

    cache = PlanCache(tmp_path / "plans")
    first, again = cache.plan(KEY, build), PlanCache(tmp_path / "plans").plan(KEY, build)
    assert first == again == tiny.plan() and len(built) == 1
    check_plan(again, LIBRARY)


def test_keys_differ_for_programs_devices_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = _program(tmp_path)
    settings = {"profiles": {"x": ((1, 6), (2, 6), (5, 6))}, "flags": ["TF32"]}
    key = plan_key(program, ["8.6"], LIBRARY, **settings)
    assert key == plan_key(_program(tmp_path / "copy"), ["8.6"], LIBRARY, **settings)
    others = {
        plan_key(_program(tmp_path / "other", b"another"), ["8.6"], LIBRARY, **settings),
        plan_key(program, ["8.6", "12.0"], LIBRARY, **settings),
        plan_key(program, ["8.6"], LIBRARY, **settings | {"flags": []}),
        plan_key(program, ["8.6"], LIBRARY, **settings | {"profiles": {"x": ((1, 6), (2, 6), (9, 6))}}),
    }
    install_nvidias(monkeypatch)
    assert len(others | {key, plan_key(program, ["8.6"], find_library("tensorrt"), **settings)}) == 6


def test_a_key_does_not_depend_on_the_order_of_settings(tmp_path: Path) -> None:
    program = _program(tmp_path)
    one, other = ({name: 1 for name in order} for order in ("ab", "ba"))
    assert plan_key(program, [], LIBRARY, settings=one) == plan_key(program, [], LIBRARY, settings=other)


def test_a_plan_for_the_gpu_that_is_here_is_another_gpus_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = _program(tmp_path)
    here, named = plan_key(program, [], LIBRARY), plan_key(program, ["8.6"], LIBRARY)
    monkeypatch.setattr(caching, "current_gpu", lambda: ["another 12.0"])
    assert plan_key(program, [], LIBRARY) != here
    assert (plan_key(program, ["8.6"], LIBRARY) == named) == LIBRARY.is_rtx


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_ignores_a_damaged_plan(tmp_path: Path, damage: str) -> None:
    cache = PlanCache(tmp_path)
    cache.write(KEY, tiny.plan())
    (path,) = tmp_path.iterdir()
    whole = bytearray(tiny.plan())
    whole[len(whole) // 2] ^= 1
    path.write_bytes({"cut": tiny.plan()[:-1], "flipped": bytes(whole), "empty": b""}[damage])
    assert cache.read(KEY) is None
    assert cache.plan(KEY, tiny.plan) == tiny.plan() == cache.read(KEY)


def test_evicts_the_least_recently_used_plans(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path, limit=250)
    keys = [f"{number:032x}" for number in range(4)]
    for place, key in enumerate(keys[:2]):
        cache.write(key, bytes([place]) * 100)
    for age, path in enumerate(sorted(tmp_path.iterdir())):
        os.utime(path, (age, age))
    assert cache.read(keys[0]) is not None  # which makes it the one that was used last
    cache.write(keys[2], b"2" * 100)
    assert [cache.read(key) is not None for key in keys[:3]] == [True, False, True]
    cache.write(keys[3], b"3" * 1000)
    assert [cache.read(key) is not None for key in keys] == [False, False, False, True], "the newest stays in any case"


def test_keeps_files_of_others(tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("notes.txt", f"{KEY}.plan", f"{KEY}-{OTHER}.planet")]
    for path in others:
        path.write_bytes(b"x" * 1000)
    cache = PlanCache(tmp_path, limit=10)
    cache.write(KEY, b"plan")
    assert [path.read_bytes() for path in others] == [b"x" * 1000] * 3
    assert cache.read(KEY) == b"plan"


def test_kernels_are_written_over(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path)
    kernels_file = cache.kernels(KEY)
    assert kernels_file.read() is None
    for content in (b"few", b"some more"):
        kernels_file.write(content)
        assert cache.kernels(KEY).read() == content
    assert cache.read(KEY) is None and len(list(tmp_path.iterdir())) == 1


def test_kernels_are_of_the_gpu_that_compiled_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PlanCache(tmp_path)
    cache.kernels(KEY).write(b"kernels")
    monkeypatch.setattr(caching, "current_gpu", lambda: ["another 12.0"])
    assert cache.kernels(KEY).read() is None


def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_plan(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = PlanCache(tmp_path / "file")
    with pytest.warns(lorac.LoracWarning, match="plan_cache='.*file' is not used: File exists"):
        assert cache.plan(KEY, lambda: b"plan") == b"plan"
    assert cache.read(KEY) is None


def test_a_folder_that_others_can_reach_is_neither_read_nor_written(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "plans")
    assert cache.write(KEY, b"plan") and cache.folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o702, 0o705):
        cache.folder.chmod(mode)
        assert cache.read(KEY) is None
        with pytest.warns(lorac.LoracWarning, match=r"is not used: its mode is not 0700, or it is another user's"):
            assert cache.plan(KEY, lambda: b"another") == b"another"
    cache.folder.chmod(0o700)
    assert cache.read(KEY) == b"plan"


def test_ignores_files_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PlanCache(tmp_path)
    cache.write(KEY, b"plan")
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda handle: SimpleNamespace(st_uid=real(handle).st_uid + 1))
    assert cache.read(KEY) is None
    monkeypatch.undo()
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.warns(lorac.LoracWarning, match="another user's"):
        assert not cache.write(OTHER, b"plan")
