"""Tenants load adapters by name, from the places that a server admits and from no others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from lorac.serving.store import AdapterStore, StoreQuotas
from tests.hub import Hub, use_hub
from tests.refusing import refuses
from tests.runtime.switching import answer, build, raw
from tests.serving.store.conftest import QUOTAS
from tests.serving.store.stores import BASE_NAME, compiled, log_of, made, native, peft


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        yield hub


@pytest.fixture(scope="module")
def open_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    folder, sources = tmp_path_factory.mktemp("open"), ["hf:ann/*", "memory://bucket/own/*"]
    with AdapterStore(compiled(), folder, quotas=QUOTAS, bases=[BASE_NAME], sources=sources) as made:
        yield made


def test_loads_an_adapter_of_an_admitted_source(hub: Hub, open_store: AdapterStore, tenant: str) -> None:
    hub.add("ann/sql", {"README.md": b"not taken", **peft(made("n", seed=1))}).commits["v2"] = dict(native(made("m")))
    open_store.load(tenant, "a", "ann/sql")
    same = answer(build([made("n", seed=1)], "eager", active="n"))
    assert raw(answer(open_store._compiled, adapters=open_store.find(tenant, "a"))) == raw(same)
    open_store.load(tenant, "b", "hf://ann/sql@v2/mine.safetensors")
    fsspec.filesystem("memory").pipe({f"/bucket/own/x/{name}": file for name, file in peft(made("m")).items()})
    open_store.load(tenant, "c", "memory://bucket/own/x")
    assert [line["outcome"] for line in log_of(open_store, tenant)] == ["done"] * 3
    with refuses("quota_full"):
        open_store.load(tenant, "d", "ann/sql")


@pytest.mark.parametrize(
    "name", ["bob/sql", "memory://bucket/other/x", "s3://bucket/own/x", "https://huggingface.co/bob/sql"]
)
def test_rejects_other_sources(hub: Hub, open_store: AdapterStore, tenant: str, name: str) -> None:
    hub.add("bob/sql", dict(peft(made("m"))))
    fsspec.filesystem("memory").pipe({f"/bucket/other/x/{name}": file for name, file in peft(made("m")).items()})
    with refuses("unreadable", match="this server loads nothing from.*\n  it loads from hf:ann/\\*, memory://bucket"):
        open_store.load(tenant, "a", name)
    assert not hub.requests
    assert open_store.names(tenant) == ["shared"]


@pytest.mark.parametrize(
    "name", ["memory://bucket/own/../other/x", "memory://bucket/own/%2e%2e/x", "hf://ann/../bob/x"]
)
def test_rejects_names_that_lead_upwards(hub: Hub, open_store: AdapterStore, tenant: str, name: str) -> None:
    with refuses("unreadable", match="is not a path inside the store"):
        open_store.load(tenant, "a", name)
    assert not hub.requests


def test_rejects_a_repository_that_has_moved_to_another_owner(hub: Hub, open_store: AdapterStore, tenant: str) -> None:
    hub.add("bob/new", dict(peft(made("m"))))
    hub.add("ann/new", dict(peft(made("m"))))
    for owner in ("bob", "ann"):
        hub.redirects[f"/api/models/ann/to-{owner}"] = f"{hub.address}/api/models/{owner}/new"
    with refuses("unreadable", match="this server loads nothing from 'hf:bob/new'\n  it loads from hf:ann/"):
        open_store.load(tenant, "a", "ann/to-bob")
    assert not any("resolve" in path for _, path, _ in hub.requests), "no file is downloaded"
    with refuses("unreadable", match="cannot be downloaded"):  # the stub moves no files
        open_store.load(tenant, "a", "ann/to-ann")
    assert open_store.names(tenant) == ["shared"]


def test_a_store_without_sources_loads_no_names(hub: Hub, store: AdapterStore, tenant: str) -> None:
    hub.add("ann/sql", dict(peft(made("m"))))
    for name in ("ann/sql", "hf://ann/sql", "memory://bucket/own/x"):
        with refuses("unreadable", match="path of an adapter below the tenant's folder"):
            store.load(tenant, "a", name)
    assert not hub.requests


def test_bounds_the_bytes_and_the_number_of_downloads(hub: Hub, tmp_path: Path, tenant: str) -> None:
    hub.add("ann/large", {**peft(made("m")), "more.safetensors": b"x" * 20_000})
    quotas = StoreQuotas(bytes=16_000, uploads_per_minute=1)
    with AdapterStore(compiled(), tmp_path / "s", quotas=quotas, bases=[BASE_NAME], sources=["hf:*"]) as made_store:
        with refuses("over_budget"):
            made_store.load(tenant, "a", "ann/large")
        hub.requests.clear()
        with refuses("too_many_uploads"):
            made_store.load(tenant, "a", "ann/large")
        assert not hub.requests
