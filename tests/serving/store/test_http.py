"""Two tenants bring adapters by HTTP, and ask for their own."""

from __future__ import annotations

import gc
import io
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

import lorac
from lorac import PromptCache
from lorac.serving import build_app
from lorac.serving.store import AdapterStore, StoreQuotas
from lorac.serving.store.reading_process import READERS
from lorac.testing import adapter_away
from tests.decoders import DECODERS, IDS
from tests.serving.models import alone, make_app, serve, settings

KEYS = {"key-a": "alice", "key-b": "bob", "key-c": "carol"}


@pytest.fixture(scope="module")
def store(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    quotas = StoreQuotas(uploads_per_minute=100, adapters=2)
    with AdapterStore(compiled, tmp_path_factory.mktemp("http"), quotas=quotas, reserved=["base"]) as made:
        yield made


@pytest.fixture(scope="module")
def app(compiled: Any, store: AdapterStore) -> Any:
    return build_app(compiled, settings(keys=KEYS, max_upload_bytes=100_000), store=store)


@pytest.fixture(scope="module")
def address(app: Any) -> Iterator[str]:
    with serve(app) as found:
        yield found


@pytest.fixture
def alice(address: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=address, headers={"authorization": "Bearer key-a"}, timeout=120) as client:
        yield client


@pytest.fixture
def bob(address: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=address, headers={"authorization": "Bearer key-b"}, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    host = DECODERS["llama"]()
    adapter = adapter_away(lorac.LoRA(r=2, targets=["q_proj", "down_proj"]), host, IDS, name="x", seed=5)
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    lorac.save_adapter(adapter, path, format="native", model=host)
    return path.read_bytes()


def upload(client: httpx2.Client, name: str, data: bytes, **fields: str) -> httpx2.Response:
    files = [("files", ("x.safetensors", data))]
    return client.post("/v1/adapters", data={"name": name, **fields}, files=files)


def complete(client: httpx2.Client, model: Any, prompt: str = "abcdefgh") -> httpx2.Response:
    return client.post("/v1/completions", json={"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0})


def test_each_tenant_has_its_own(
    alice: httpx2.Client, bob: httpx2.Client, file: bytes, compiled: Any, store: Any
) -> None:
    assert (added := upload(alice, "secret", file)).status_code == 201, added.text
    assert upload(alice, "secret", file).json() == added.json()
    assert {model["id"] for model in alice.get("/v1/models").json()["data"]} == {"base", "one", "two", "secret"}
    assert {model["id"] for model in bob.get("/v1/models").json()["data"]} == {"base", "one", "two"}
    key = store.find("alice", "secret")
    answer = complete(alice, "secret")
    assert answer.json()["choices"][0]["text"] == alone(compiled, "abcdefgh", key, max_new_tokens=6)
    for model in ("secret", key, "secret:0.5+one:0.5", "one:0.5+secret:0.5"):
        refused = complete(bob, model)
        assert (refused.status_code, "alice" in refused.text.replace(key, "")) == (404, False), refused.text
    rows = {"model": "base", "prompt": ["a", "b"], "adapters": ["one", "secret"], "max_tokens": 1}
    assert [tenant.post("/v1/completions", json=rows).status_code for tenant in (alice, bob)] == [200, 404]
    assert bob.delete("/v1/adapters/secret").status_code == 404
    assert complete(bob, "one").status_code == 200
    assert [one["id"] for one in bob.get("/v1/adapters").json()["data"]] == ["one", "two"]
    assert alice.delete("/v1/adapters/secret").json() == {"id": "secret", "object": "adapter", "deleted": True}
    assert complete(alice, "secret").status_code == 404


def test_prompts_are_kept_for_each_tenant(alice: httpx2.Client, bob: httpx2.Client, file: bytes, address: str) -> None:
    for client in (alice, bob):
        upload(client, "mine", file)
        first, second = (complete(client, "mine", 3 * "the same beginning").json() for _ in range(2))
        assert first["choices"] == second["choices"]
    own = {(tenant, name.partition("/")[0]) for tenant, names in _kept_prompts() for name in names if "/" in name}
    assert own == {("alice", "alice"), ("bob", "bob")}
    for client in (alice, bob):
        client.delete("/v1/adapters/mine")
    assert not any("/" in name for _, names in _kept_prompts() for name in names)


def test_a_request_keeps_its_adapter_after_an_unload(compiled: Any, store: AdapterStore, file: bytes) -> None:
    key = store.upload("carol", "mine", {"x.safetensors": io.BytesIO(file)}).key
    ids, options = torch.arange(5, 11), {"max_new_tokens": 12, "eos_token_id": None}
    expected = compiled.generate(ids[None], adapters=key, **options)[0, len(ids) :].tolist()
    with lorac.Scheduler(compiled, rows=2) as scheduler:
        tokens = iter(scheduler.submit(lorac.TextRequest(ids, key, options=options)))
        found = [next(tokens).id]
        store.unload("carol", "mine")
        found += [token.id for token in tokens]
    assert found == expected


def _kept_prompts() -> list[tuple[str, tuple[str, ...]]]:
    """Return the tenant and the adapters of each prompt that a scheduler keeps."""
    caches = [found for found in gc.get_objects() if isinstance(found, PromptCache)]
    keys = [entry.key for cache in caches for entry in cache._entries]
    return [(str(key[0][1]), tuple(name for name, _ in key[1])) for key in keys if isinstance(key[0], tuple)]


@pytest.mark.parametrize(
    ("fields", "files", "status", "said"),
    [
        ({}, [("x.safetensors", b"x")], 400, "name"),
        ({"name": "n"}, [], 400, "files"),
        ({"name": "n", "path": "/etc"}, [("x.safetensors", b"x")], 400, "path"),
        ({"name": "n"}, [("x.safetensors", b"x"), ("x.safetensors", b"y")], 400, "two files of one name"),
        ({"name": "../n"}, [("x.safetensors", b"x")], 400, "cannot be called"),
        ({"name": "base"}, [("x.safetensors", b"x")], 409, "reserved"),
        ({"name": "n"}, [("x.bin", b"x")], 400, "x.bin"),
        ({"name": "n"}, [("x.safetensors", b"x")], 400, "format"),
        ({"name": "n"}, [("x.safetensors", bytes(200_000))], 413, "100000"),
    ],
)
def test_wrong_uploads(alice: httpx2.Client, fields: Any, files: Any, status: int, said: str) -> None:
    given = [("files", file) for file in files] or [("other", ("x", b""))]
    answer = alice.post("/v1/adapters", data=fields, files=given)
    assert (answer.status_code, said in answer.text) == (status, True), answer.text


def test_loads_are_counted_by_every_way(app: Any, alice: httpx2.Client, store: AdapterStore, file: bytes) -> None:
    metrics = app.state.metrics

    def counts() -> dict[str, int]:
        found = re.findall(r'^lorac_adapter_load_seconds_count{.*way="(.*)"} (.*)$', metrics.expose().decode(), re.M)
        return {way: int(float(count)) for way, count in found}

    before = counts()
    assert upload(alice, "sent", file).status_code == 201
    assert complete(alice, "sent").status_code == 200
    store.unload("alice", "sent")
    incoming = store._folder.incoming("alice")
    incoming.mkdir()
    (incoming / "x.safetensors").write_bytes(file)
    given = {"lora_name": "put", "lora_path": "x.safetensors"}
    assert (put := alice.post("/v1/load_lora_adapter", json=given)).status_code == 200, put.text
    assert alice.post("/v1/load_lora_adapter", json={**given, "lora_path": "y"}).status_code == 400
    store.unload("alice", "put")
    assert {way: count - before.get(way, 0) for way, count in counts().items()} == {"upload": 1, "path": 1, "use": 1}


def test_a_slow_source_holds_up_no_upload(
    alice: httpx2.Client,
    bob: httpx2.Client,
    address: str,
    store: AdapterStore,
    file: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun, opened = threading.Semaphore(0), threading.Event()

    def load_slowly(tenant: str, name: str, path: str) -> None:
        begun.release()
        opened.wait(60)

    monkeypatch.setattr(store, "load", load_slowly)
    given = {"lora_name": "slow", "lora_path": "hf://ann/slow"}
    with ThreadPoolExecutor(READERS) as threads:
        loads = [threads.submit(one.post, "/v1/load_lora_adapter", json=given) for one in (alice, bob)]
        assert all(begun.acquire(timeout=30) for _ in loads)
        try:
            with httpx2.Client(base_url=address, headers={"authorization": "Bearer key-c"}, timeout=30) as carol:
                assert upload(carol, "n", file).status_code == 201
        finally:
            opened.set()
    assert [one.result().status_code for one in loads] == [200] * READERS
    store.unload("carol", "n")


def test_quotas_and_keys(alice: httpx2.Client, address: str, file: bytes) -> None:
    assert httpx2.post(f"{address}/v1/adapters", data={"name": "n"}).status_code == 401
    assert [upload(alice, name, file).status_code for name in ("a", "b", "c")] == [201, 201, 403]
    for name in "ab":
        assert alice.delete(f"/v1/adapters/{name}").status_code == 200


def test_has_no_route_for_uploads_without_a_store(compiled: Any, tmp_path: Path) -> None:
    assert "/v1/adapters" not in {getattr(route, "path", "") for route in make_app(compiled).routes}
