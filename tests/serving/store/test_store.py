"""Tenants bring adapters while the model runs, and find their own and no others."""

from __future__ import annotations

import gc
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.serving.store import AdapterStore
from tests.refusing import refuses
from tests.runtime.switching import ENTRY, answer, build, raw
from tests.serving.store.conftest import QUOTAS
from tests.serving.store.stores import BASE_NAME, CONFIG, compiled, edited, log_of, made, native, peft, send


def expected(adapter: lorac.Adapter) -> torch.Tensor:
    return answer(build([adapter], "eager", active=adapter.name))


@pytest.mark.medium("PEFT's files", cases=["native"])
@pytest.mark.parametrize("write", [native, peft])
def test_an_uploaded_adapter_matches_a_compiled_one(store: AdapterStore, tenant: str, write: Any) -> None:
    added = send(store, tenant, "mine", write(made("m")))
    assert store.find(tenant, "mine") == added.key
    assert raw(answer(store._compiled, adapters=added.key)) == raw(expected(made("m")))
    assert [one.name for one in store.adapters(tenant)] == ["mine", "shared"]
    assert store.find(tenant, "shared") == "shared"
    (line,) = log_of(store, tenant)
    assert (line["action"], line["name"], line["digest"], line["outcome"]) == ("upload", "mine", added.digest, "done")


def test_adapters_are_loaded_from_the_tenants_folder(store: AdapterStore, tenant: str) -> None:
    incoming = store._folder.incoming(tenant)
    for name, files in {"one": native(made("m")), "deep/two": peft(made("n", seed=1))}.items():
        (incoming / name).mkdir(parents=True)
        for file, data in files.items():
            (incoming / name / file).write_bytes(data)
    (incoming / "deep/two/README.md").write_text("not read")
    assert store.load(tenant, "a", "one/mine.safetensors").digest == send(store, tenant, "c", native(made("m"))).digest
    store.load(tenant, "b", "deep/two")
    assert raw(answer(store._compiled, adapters=store.find(tenant, "b"))) == raw(expected(made("n", seed=1)))


def test_equal_bytes_cost_once_for_each_tenant(store: AdapterStore, tenant: str) -> None:
    file, before = native(made("m")), len(store._compiled.pool)
    one, again, two = (send(store, tenant, name, file) for name in ("one", "one", "two"))
    assert (one, one.key) == (again, two.key)
    account = store._tenants[tenant].account
    assert (account.bytes, account.adapters, len(store._compiled.pool)) == (one.nbytes, 2, before + 1)
    other = send(store, f"{tenant}-b", "one", file)
    assert (other.digest, other.key != one.key) == (one.digest, True)
    store.unload(tenant, "one")
    assert raw(answer(store._compiled, adapters=two.key)) == raw(expected(made("m")))
    store.unload(tenant, "two")
    assert (account.bytes, account.adapters, len(store._compiled.pool)) == (0, 0, before + 1)
    assert not store._folder.file_of(tenant, one.digest).exists()


def test_rejects_a_name_in_use_until_it_is_unloaded(store: AdapterStore, tenant: str) -> None:
    send(store, tenant, "mine", native(made("m")))
    with refuses("adapter_exists", match="unload it first"):
        send(store, tenant, "mine", native(made("n", seed=1)))
    assert raw(answer(store._compiled, adapters=store.find(tenant, "mine"))) == raw(expected(made("m")))
    store.unload(tenant, "mine")
    send(store, tenant, "mine", native(made("n", seed=1)))
    assert raw(answer(store._compiled, adapters=store.find(tenant, "mine"))) == raw(expected(made("n", seed=1)))
    assert store._tenants[tenant].account.adapters == 1


def test_a_held_adapter_survives_an_unload(store: AdapterStore, tenant: str) -> None:
    model = store._compiled
    used, key = model.memory.used, send(store, tenant, "mine", native(made("m"))).key
    with model.hold(key) as held:
        store.unload(tenant, "mine")
        with refuses("adapter_not_found"):
            store.find(tenant, "mine")
        assert raw(answer(model, adapters=held)) == raw(expected(made("m")))
        assert model.memory.used > used
    gc.collect()
    assert model.memory.used == used


@pytest.fixture
def folder(store: AdapterStore, tenant: str, tmp_path: Path) -> Path:
    """A folder with two adapters, one of them under two names."""
    for name, adapter in {"a": made("m"), "b": made("n", seed=1), "c": made("m")}.items():
        send(store, tenant, name, native(adapter))
    shutil.copytree(store._folder.path / "adapters" / tenant, tmp_path / "adapters" / tenant)
    return tmp_path


def test_adapters_survive_a_restart(
    folder: Path, store: AdapterStore, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = compiled()
    monkeypatch.chdir(folder.parent)
    with AdapterStore(other, folder.name) as again:
        monkeypatch.chdir("/")
        assert again.adapters(tenant) == store.adapters(tenant)
        old, new = (one._tenants[tenant].account for one in (store, again))
        assert (new.bytes, new.adapters) == (old.bytes, old.adapters)
        assert raw(answer(other, adapters=again.find(tenant, "b"))) == raw(expected(made("n", seed=1)))
        with pytest.raises(lorac.LoracError, match="another store uses"):
            AdapterStore(compiled(), folder)
        again.unload(tenant, "a")
        again.unload(tenant, "b")
    with AdapterStore(compiled(), folder) as again:
        assert [one.name for one in again.adapters(tenant)] == ["c", "shared"]


def test_a_restart_skips_and_keeps_damaged_files(folder: Path, tenant: str) -> None:
    changed = next(folder.rglob("b@*"))
    changed.with_name(f"{changed.name[2:]}.safetensors").write_bytes(b"\1" * 20)
    with pytest.warns(lorac.LoracWarning, match="left out"), AdapterStore(compiled(), folder) as again:
        assert [one.name for one in again.adapters(tenant)] == ["a", "c", "shared"]
    assert changed.exists()


@pytest.mark.parametrize(
    ("files", "base"),
    [
        (lambda: edited(peft(made("m")), base_model_name_or_path="acme/other"), None),
        (lambda: edited(peft(made("m")), base_model_name_or_path=None), None),
        (lambda: peft(made("m")), "float32:" + 32 * "0"),
        (lambda: peft(made("m")), "no hash"),
        (lambda: native(made("m"), made_for_others()), None),
        (lambda: native(made("m")), "float32:" + 32 * "0"),
    ],
    ids=["another name", "no name", "another hash", "not a hash", "other weights", "two hashes"],
)
def test_the_base_must_be_the_models(store: AdapterStore, tenant: str, files: Any, base: str | None) -> None:
    with refuses("base_mismatch"):
        send(store, tenant, "mine", files(), base)


def made_for_others() -> torch.nn.Module:
    from tests.serving.store.stores import host_with_other_weights

    return host_with_other_weights()


def test_checks_the_hash_of_the_base_of_an_upload(store: AdapterStore, tenant: str) -> None:
    from lorac.adapters.base_hash import compute_base_hash
    from lorac.frontend.model_view import ModelView

    known = compute_base_hash(ModelView.of(ENTRY.fresh(torch.float32)), made("m").tensors)
    send(store, tenant, "mine", edited(peft(made("m")), base_model_name_or_path=None), known)


@pytest.mark.slow
def test_a_thousand_adapters_take_little(store: AdapterStore, tmp_path: Path) -> None:
    source = store._folder.path / "adapters"
    key = send(store, "many", "mine", native(made("m")))
    folder = tmp_path / "adapters" / "many"
    folder.mkdir(parents=True)
    file = (source / "many" / f"{key.digest}.safetensors").read_bytes()
    for number in range(COUNT):
        (folder / f"{number:032x}.safetensors").write_bytes(file)
        (folder / f"n{number}@{number:032x}").touch()
    model = compiled()
    with AdapterStore(model, tmp_path / "first", bases=[BASE_NAME]):
        pass  # imports what it needs
    tracemalloc.start()
    try:
        with AdapterStore(model, tmp_path, quotas=QUOTAS, bases=[BASE_NAME]) as many:
            gc.collect()
            taken, _ = tracemalloc.get_traced_memory()
            shutil.rmtree(folder)
            assert len(many.adapters("many")) == COUNT + 1
            assert many.find("many", "n7") == f"many/{7:032x}"
    finally:
        tracemalloc.stop()
    assert taken / COUNT <= MOST_BYTES


COUNT, MOST_BYTES = 1000, 10_000


def test_a_baked_model_takes_no_adapters(tmp_path: Path) -> None:
    with refuses("unavailable"):
        AdapterStore(build([made("m")], "eager", "baked"), tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_names_are_few_characters(store: AdapterStore, tenant: str) -> None:
    for name in ("", "a/b", "..", ".hidden", "a\nb", "\x1b[2J", "a b", "ä", 65 * "a", "a@b", "a:0.5", None, 7):
        with refuses("adapter_error", match="cannot be called"):
            send(store, tenant, name, {})
        with refuses("adapter_not_found"):
            store.find(tenant, name)
    for name in ("base", "shared"):
        with refuses("adapter_exists", match="reserved"):
            send(store, tenant, name, {})
    for other in ("", "..", "a/b", "a\0b", None):
        with refuses("adapter_error", match="a tenant cannot be called"):
            send(store, other, "mine", {})
    text = store._audit._path.read_text(encoding="ascii")
    assert all(line.isprintable() for line in text.splitlines())
    assert {line["name"] for line in log_of(store, tenant)} >= {"a\nb", "\x1b[2J", "None"}


def test_rejects_unloading_a_shared_adapter(store: AdapterStore, tenant: str) -> None:
    with refuses("adapter_error", match="for all tenants"):
        store.unload(tenant, "shared")
    with refuses("adapter_not_found"):
        store.unload(tenant, CONFIG)
