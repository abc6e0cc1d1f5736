"""Thousands of adapters on disk, and as many of them in memory as a budget has room for."""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.session import registry
from lorac.testing import adapter_away, assert_close
from lorac.variants.base import Variant
from tests.decoders import DECODERS
from tests.refusing import refuses
from tests.runtime.switching import ENTRY, X, adapter, answer, build, raw
from tests.runtime.test_threads import running

ROOM = lorac.Reserve(targets=("up", "down", "head"), rank=4, adapters=2, scales=True)
METHODS: tuple[Variant, ...] = (
    lorac.LoRA(r=3, alpha=5, targets=("up", "down", "head")),
    lorac.DoRA(r=2, targets=("up", "head")),
    lorac.LoRA(r=1, targets=("down",)),
)


@functools.cache
def made() -> list[lorac.Adapter]:
    host = ENTRY.fresh(torch.float32)
    return [adapter_away(METHODS[i % 3], host, X, name=f"n{i}", seed=i) for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of three methods, in the formats of PEFT and of lorac."""
    folder = tmp_path_factory.mktemp("bank")
    for i, one in enumerate(made()):
        path = folder / (one.name if i % 2 else f"{one.name}.safetensors")
        lorac.save_adapter(one, path, format="peft" if i % 2 else "native", model=ENTRY.fresh(torch.float32))
    return folder


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host with room and no adapter, compiled once."""
    build([], "onnxruntime", reserve=ROOM, self_test=False).save(folder := tmp_path_factory.mktemp("program") / "it")
    return folder


@pytest.fixture
def compiled(program: Path, folder: Path) -> Any:
    compiled = lorac.load(program, threads=1)
    assert compiled.register(folder) == [f"n{i}" for i in range(6)]
    return compiled


@pytest.fixture
def in_memory(program: Path) -> Any:
    """Return a program whose adapters are all in memory."""
    model = lorac.load(program, threads=1)
    for one in made():
        model.add_adapter(one)
    return model


def test_registered_names_work_wherever_a_name_does(compiled: Any, in_memory: Any) -> None:
    other = in_memory
    assert (compiled.memory.used, compiled.adapters) == (0, {})
    for choice in ("n0", {"n1": 0.5, "n2": 0.5}, {"n4": lorac.Active(0.3)}, None, [None, "n3", "n0"]):
        assert raw(answer(compiled, adapters=choice)) == raw(answer(other, adapters=choice))
    compiled.swap("n5")
    other.swap("n5")
    assert compiled.active == {"n5": 1.0}
    assert raw(answer(compiled)) == raw(answer(other))
    assert "n5" in str(compiled.explain())
    assert "n0" not in str(compiled.explain())
    compiled.remove_adapter("n5")
    assert compiled.active == {}
    with refuses("adapter_not_found"):
        compiled.swap("n5")
    compiled.add_adapter(adapter("lora", "a"), name="n5")


@pytest.mark.medium("live", cases=["fused"])
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_on_target_eager(mode: str, folder: Path, in_memory: Any) -> None:
    eager = build([], "eager", mode, reserve=ROOM)
    eager.register(folder)
    eager.swap("n1")
    assert_close(answer(eager), answer(in_memory, adapters="n1"))


def test_a_call_reads_no_other_registered_adapter(folder: Path, tmp_path: Path) -> None:
    for one in folder.iterdir():
        shutil.copytree(one, tmp_path / one.name) if one.is_dir() else shutil.copy(one, tmp_path)
    compiled = build([], "eager", reserve=ROOM)
    compiled.register(tmp_path)
    (tmp_path / "n0.safetensors").write_bytes(b"")
    answer(compiled, adapters="n1")
    assert compiled.pool.resident == ["n1"]


def test_a_registered_adapter_takes_no_gradients(folder: Path) -> None:
    eager = build([], "eager", reserve=ROOM)
    eager.register(folder)
    with refuses("unavailable", match="torch.no_grad"):
        eager(tokens=X, adapters="n1")


def test_evicts_unused_adapters_and_reads_them_again(compiled: Any) -> None:
    expected = {f"n{i}": raw(answer(compiled, adapters=f"n{i}")) for i in range(6)}
    everything = compiled.memory.used
    compiled.swap("n0")
    limit = compiled.memory.limit = everything * 3 // 4
    for name in [*expected, *reversed(expected), *expected]:
        assert raw(answer(compiled, adapters=name)) == expected[name]
        assert compiled.memory.used <= limit
    assert raw(answer(compiled)) == expected["n0"]
    compiled.swap(None)
    compiled.memory.limit = 0
    assert compiled.memory.used == 0


def let_all_go(compiled: Any) -> None:
    compiled.memory.limit = 0
    compiled.memory.limit = None
    assert compiled.memory.used == 0


def test_restores_an_evicted_adapter_with_one_read(
    compiled: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"n{i}" for i in range(6)]
    expected = {name: raw(answer(compiled, adapters=name)) for name in names}
    mixture, listed = raw(answer(compiled, adapters={"n1": 0.5, "n4": 0.5})), sorted(folder.iterdir())
    before = compiled.memory.used
    let_all_go(compiled)
    assert [raw(answer(compiled, adapters=name)) for name in names] == [*expected.values()]
    let_all_go(compiled)
    assert sorted(folder.iterdir()) == listed, "the file has no name"
    images = compiled.switch.states._images
    assert images._images.keys() == set(names)
    assert len({image.layout for image in images._images.values()}) == 3, "those of one structure share it"
    monkeypatch.setattr("lorac.session.registry.AdapterRegistry.read", None)
    for name in [*names, *reversed(names)]:
        assert raw(answer(compiled, adapters=name)) == expected[name]
    assert compiled.memory.used < before
    compiled.swap("n1")
    assert raw(answer(compiled)) == expected["n1"]
    rows = [*names, None]
    together = compiled(tokens=X[:1].expand(7, *X.shape[1:]), adapters=rows)
    for row, name in zip(together, rows, strict=True):
        assert_close(row[None], answer(compiled, X[:1], adapters=name))
    compiled.swap(None)
    let_all_go(compiled)
    monkeypatch.undo()
    assert raw(answer(compiled, adapters={"n1": 0.5, "n4": 0.5})) == mixture
    compiled.swap("n1")
    assert "n1" in str(compiled.explain())


def test_writes_an_image_at_the_second_eviction(program: Path, tmp_path: Path) -> None:
    names = ["m0", "m1", "m2"]
    for name in names:
        one = adapter_away(METHODS[0], ENTRY.fresh(torch.float32), X, name=name, seed=int(name[1]))
        lorac.save_adapter(one, tmp_path / name, model=ENTRY.fresh(torch.float32))
    compiled: Any = lorac.load(program, threads=1)
    compiled.register(tmp_path)
    for written in ([], names):
        expected = [raw(answer(compiled, adapters=name)) for name in names]
        let_all_go(compiled)
        assert [*compiled.switch.states._images._images] == written
    assert [raw(answer(compiled, adapters=name)) for name in names] == expected


def test_an_image_is_of_the_adapter_that_is_registered_now(compiled: Any, in_memory: Any, tmp_path: Path) -> None:
    first, second = made()[1], dataclasses.replace(made()[4], name="n1")
    for _ in range(3):
        answer(compiled, adapters="n1")
        let_all_go(compiled)
    images = compiled.switch.states._images
    end = images._end
    compiled.remove_adapter("n1")
    assert "n1" not in images._images
    lorac.save_adapter(second, tmp_path / "n1", model=ENTRY.fresh(torch.float32))
    compiled.register(tmp_path)
    assert first.variant == second.variant
    for _ in range(3):
        assert raw(answer(compiled, adapters="n1")) == raw(answer(in_memory, adapters="n4"))
        let_all_go(compiled)
    assert images._end == end, "the space of a removed adapter is used again"


def test_an_adapter_replaced_during_a_read_is_the_new_one(
    compiled: Any, in_memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lorac.save_adapter(dataclasses.replace(made()[4], name="n1"), tmp_path / "n1", model=ENTRY.fresh(torch.float32))
    expected, read = raw(answer(in_memory, adapters="n4")), registry.AdapterRegistry.read

    def exchange(*given: Any) -> lorac.Adapter:
        monkeypatch.undo()
        adapter = read(*given)
        compiled.remove_adapter("n1")
        compiled.register(tmp_path)
        return adapter

    monkeypatch.setattr(registry.AdapterRegistry, "read", exchange)
    assert [raw(answer(compiled, adapters="n1")) for _ in range(2)] == [expected] * 2


@pytest.mark.medium("test_restores_an_evicted_adapter_with_one_read")
def test_reads_files_again_where_images_cannot_be_written(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError("read-only")

    expected = raw(answer(compiled, adapters="n1"))
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    let_all_go(compiled)
    assert not compiled.switch.states._images._images
    assert raw(answer(compiled, adapters="n1")) == expected
    monkeypatch.undo()
    monkeypatch.setattr("lorac.runtime.slot_images._write", lambda *_: refuse())
    let_all_go(compiled)
    assert not compiled.switch.states._images._images
    assert raw(answer(compiled, adapters="n1")) == expected
    monkeypatch.undo()
    monkeypatch.setattr(compiled.switch.states._images, "_process", -1)
    let_all_go(compiled)
    assert not compiled.switch.states._images._images, "a forked process would write over its parent's"


def test_rejects_a_choice_beyond_the_budget_and_changes_nothing(compiled: Any) -> None:
    compiled.swap("n0")
    expected, used = raw(answer(compiled)), compiled.memory.used
    compiled.memory.limit = used + 10
    with compiled.hold("n0"):
        for refused in (
            lambda: compiled.swap("n1"),
            lambda: answer(compiled, adapters="n3"),
            lambda: compiled.add_adapter(adapter("lora", "a"), name="late"),
        ):
            with refuses("over_budget"):
                refused()
            gc.collect()
            assert (compiled.memory.used, compiled.active) == (used, {"n0": 1.0})
            assert "late" not in compiled.adapters
            assert raw(answer(compiled)) == expected
    with refuses("over_budget"):
        compiled.prefetch("n1").result()


def test_a_removed_adapters_bytes_are_back_when_the_last_holder_ends(compiled: Any) -> None:
    with compiled.hold("n0") as first:
        expected, used = raw(answer(compiled, adapters=first)), compiled.memory.used
        compiled.remove_adapter("n0")
        assert compiled.memory.used == used
        assert raw(answer(compiled, adapters=first)) == expected
    assert compiled.memory.used == 0


@pytest.mark.medium("test_threads_share_the_bank")
def test_a_thread_reads_ahead(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.prefetch({"n1": 0.5, "n2": 0.5}).result(20)
    monkeypatch.setattr("lorac.session.registry.load_adapter", None)
    answer(compiled, adapters={"n1": 0.5, "n2": 0.5})
    with refuses("adapter_not_found"):
        compiled.prefetch("n9")


@pytest.mark.medium("test_scheduler.py: a request waits for memory")
def test_caches_share_the_budget_with_adapters() -> None:
    model = lorac.compile(
        DECODERS["llama"](),
        {"a": lorac.LoRA(r=2, targets=["q_proj"])},
        target="onnxruntime",
        cache=True,
        self_test=False,
    )
    before = model.memory.used
    cache, prompts = model.engine.new_cache("main", 2, 8), lorac.PromptCache()
    assert model.memory.used == before + cache.nbytes
    ids = torch.arange(3, 9)[None]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, prompt_cache=prompts)
    assert model.memory.used == before + cache.nbytes + prompts.used > before + cache.nbytes
    model.memory.limit = before + cache.nbytes + prompts.used // 2
    assert (len(prompts), prompts.used) == (0, 0), "prompts make room"
    with refuses("over_budget"):
        cache.grow(1 << 20)
    with refuses("over_budget"):
        model.generate(ids, max_new_tokens=20, do_sample=False)
    model.memory.limit = None
    assert model.generate(ids, max_new_tokens=4, do_sample=False, prompt_cache=prompts).equal(expected)
    model.remove_adapter("a")
    del cache, prompts
    gc.collect()
    assert model.memory.used == 0


def count_calls(work: Callable[[], object]) -> int:
    """Return the number of functions that some work calls, of Python and of C."""
    events: list[str] = []
    gc.collect()
    gc.disable()
    sys.setprofile(lambda _, event, __: events.append(event))
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return events.count("call") + events.count("c_call")


def count_adding(compiled: Any, name: str) -> int:
    """Return what it takes to add an adapter and to swap to it."""

    def add() -> None:
        compiled.add_adapter(adapter("lora", "a"), name=name)
        compiled.swap(name)
        compiled.swap(None)

    return count_calls(add)


@pytest.mark.medium("test_headers_alone_are_read")
def test_two_thousand_registered_adapters_take_next_to_nothing(folder: Path, tmp_path: Path) -> None:
    """Neither memory, nor time when another is added."""
    source = folder / "n1"
    for i in range(2000):
        shutil.copytree(source, tmp_path / "many" / f"r{i}", copy_function=lambda a, b: Path(b).hardlink_to(a))
    compiled = build([], "onnxruntime", reserve=ROOM, self_test=False)
    compiled.register(folder)
    count_adding(compiled, "late0")
    few = count_adding(compiled, "late1")
    for name in ("late0", "late1"):
        compiled.remove_adapter(name)
    tracemalloc.start()
    compiled.register(tmp_path / "many")
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert taken / 2000 < 1000
    assert compiled.memory.used == 0
    assert raw(answer(compiled, adapters="r1999")) == raw(answer(compiled, adapters="n1"))
    entries = compiled.pool.entries
    assert count_adding(compiled, "late2") - few < 1000, "fewer calls than there are adapters"
    assert compiled.pool.entries is entries, "a copy would take as long as there are adapters"


@pytest.mark.medium("test_fit.py's faults, and beyond the budget")
def test_rejects_registering_an_adapter_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    compiled = build([], "onnxruntime", reserve=dataclasses.replace(ROOM, rank=1), self_test=False)
    with refuses("needs_recompile"):
        compiled.register(folder)
    assert list(compiled.pool) == []
    with refuses("unknown_format", match="no adapters"):
        compiled.register(tmp_path)
    compiled.add_adapter(made()[2], name="n4")
    shutil.copytree(folder / "n1", tmp_path / "n1")
    shutil.copytree(folder / "n1", tmp_path / "n4")
    with refuses("adapter_exists"):
        compiled.register(tmp_path)
    assert list(compiled.pool) == ["n4"]


def test_checks_a_file_that_changed_after_registering(program: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "them")
    compiled = lorac.load(program)
    compiled.register(tmp_path / "them")
    path = tmp_path / "them" / "n1" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with refuses("corrupt_file"):
        compiled.swap("n1")
    assert (compiled.active, compiled.memory.used) == ({}, 0)


def test_rejects_saving_registered_adapters_in_use(compiled: Any, folder: Path, tmp_path: Path) -> None:
    compiled.swap("n0")
    with refuses("unavailable", match="'n0' is registered"):
        compiled.save(tmp_path / "it")
    assert not (tmp_path / "it").exists()
    expected = raw(answer(compiled))
    compiled.swap(None)
    with pytest.warns(lorac.LoracWarning, match="6 registered adapters are not saved"):
        compiled.save(tmp_path / "it")
    loaded = lorac.load(tmp_path / "it")
    loaded.register(folder)
    assert raw(answer(loaded, adapters="n0")) == expected


@pytest.mark.medium("saved folders of session/test_artifact.py")
def test_onnx_adapters_false_stores_each_adapter_once(in_memory: Any, tmp_path: Path) -> None:
    model = in_memory
    model.save(tmp_path / "both")
    model.save(tmp_path / "once", onnx_adapters=False)
    files = {path.name for path in (tmp_path / "once" / "adapters").iterdir()}
    assert files == {f"n{i}.safetensors" for i in range(6)}
    assert len([*(tmp_path / "both" / "adapters").iterdir()]) == 12
    loaded, other = lorac.load(tmp_path / "once"), lorac.load(tmp_path / "both")
    assert raw(answer(loaded, adapters="n1")) == raw(answer(other, adapters="n1"))
    loaded.save_choice(tmp_path / "n1.onnx_adapter", "n1")
    assert (tmp_path / "n1.onnx_adapter").read_bytes() == (tmp_path / "both/adapters/n1.onnx_adapter").read_bytes()


def test_headers_alone_are_read(compiled: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But of files that a format asks for values."""
    monkeypatch.setattr("lorac.formats.reading.read_tensors", None)
    own = registry.AdapterRegistry(compiled.session)
    for i in range(6):
        own._check(f"new{i}", folder / (f"n{i}" if i % 2 else f"n{i}.safetensors"))
    assert len(own._checked) == 6


class Client:
    """Does things at random with a compiled model, and checks every answer."""

    def __init__(self, compiled: Any, seed: int) -> None:
        names = [f"n{i}" for i in range(6)]
        self.compiled, self.generator = compiled, random.Random(seed)
        self.choices = [*names, None, {"n0": 0.5, "n3": 0.5}, {"n1": 0.3}]
        self.expected = {str(choice): raw(answer(compiled, adapters=choice)) for choice in self.choices}
        self.late, self.held = adapter("lora", "a"), list[Any]()

    def call(self) -> None:
        choice = self.generator.choice(self.choices)
        assert raw(answer(self.compiled, adapters=choice)) == self.expected[str(choice)]

    def swap(self) -> None:
        self.compiled.swap(self.generator.choice(self.choices))

    def hold(self) -> None:
        choice = self.generator.choice(self.choices)
        block = self.compiled.hold(choice)
        self.held.append((choice, block, block.__enter__()))

    def let_go(self) -> None:
        if not self.held:
            return
        choice, block, holder = self.held.pop(self.generator.randrange(len(self.held)))
        assert raw(answer(self.compiled, adapters=holder)) == self.expected[str(choice)]
        block.__exit__(None, None, None)

    def add_or_remove(self) -> None:
        if "late" in self.compiled.adapters:
            self.compiled.remove_adapter("late")
        else:
            self.compiled.add_adapter(self.late, name="late")


@pytest.mark.medium("its operations, one by one")
@pytest.mark.parametrize("steps", [400, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_random_operations_keep_to_the_limit_and_end_at_zero(steps: int, compiled: Any) -> None:
    client, refused = Client(compiled, steps), 0
    limit = compiled.memory.limit = compiled.memory.used // 2
    works = [client.call, client.call, client.swap, client.hold, client.let_go, client.add_or_remove]
    for _ in range(steps):
        before = compiled.active, list(compiled.adapters)
        try:
            client.generator.choice(works)()
        except lorac.OverBudget:
            refused += 1
            assert (compiled.active, list(compiled.adapters)) == before
        assert compiled.memory.used <= limit
    assert refused
    while client.held:
        client.let_go()
    compiled.swap(None)
    for name in list(compiled.pool):
        compiled.remove_adapter(name)
    gc.collect()
    assert compiled.memory.used == 0


def test_threads_share_the_bank(compiled: Any) -> None:
    names = [f"n{i}" for i in range(6)]
    expected = {name: raw(answer(compiled, adapters=name)) for name in names}
    compiled.memory.limit = compiled.memory.used * 2 // 3
    generator = random.Random(0)

    def call() -> bool:
        name = generator.choice(names)
        try:
            return raw(answer(compiled, adapters=name)) == expected[name]
        except lorac.OverBudget:  # the other threads hold all that there is room for
            return True

    with running(call, times=6) as found:
        wait([compiled.prefetch(generator.choice(names)) for _ in range(60)])
    assert found
    assert all(found)
    compiled.memory.limit = 0
    assert compiled.memory.used == 0
