"""Attacks on the store: each is rejected by its error, and leaves nothing."""

from __future__ import annotations

import io
import json
import os
import threading
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.serving.store import AdapterStore
from lorac.serving.store.intake import open_files
from tests.refusing import refuses
from tests.runtime.switching import answer
from tests.serving.store.conftest import QUOTAS
from tests.serving.store.stores import (
    CONFIG,
    WEIGHTS,
    Files,
    edited,
    header_of,
    log_of,
    made,
    native,
    peft,
    send,
    tensor_file,
    with_header,
)

MANY = 100_000


def left(store: AdapterStore, tenant: str) -> tuple[Any, ...]:
    """What an upload could leave: files, names, quotas, registered adapters."""
    own = store._tenants[tenant]
    folder = store._folder.path
    work = [path.name for path in folder.iterdir() if path.name.startswith(".work")]
    files = [path for path in (folder / "adapters").rglob("*") if path.parent.name == tenant]
    keys = [key for key in store._compiled.pool if key.startswith(f"{tenant}/")]
    return work, files, keys, own.adapters, own.account.bytes, own.account.adapters


def file(adapter: lorac.Adapter | None = None) -> bytes:
    """A native file."""
    return native(adapter or made("m"))["mine.safetensors"]


def alone(data: bytes) -> Files:
    return {"x.safetensors": data}


def rewritten(change: Callable[[dict[str, Any]], None]) -> Files:
    """A native file with a changed header."""
    header = header_of(file())
    change(header)
    return alone(with_header(file(), json.dumps(header).encode()))


def rewritten_site() -> Files:
    text = file().replace(b"tensors/up/", b"tensors/pu/")
    return alone(text)


def recorded(**fields: Any) -> Files:
    """A native file with other fields in its record, whose seal is removed."""

    def change(header: dict[str, Any]) -> None:
        metadata = header["__metadata__"]
        metadata["lorac"] = json.dumps({**json.loads(metadata["lorac"]), **fields})
        metadata.pop("lorac_seal")

    return rewritten(change)


def zip_bomb() -> Files:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(WEIGHTS, bytes(10_000_000))
    return alone(packed.getvalue())


def not_finite(value: float) -> Files:
    adapter = made("m")
    tensors = {path: {n: t.clone() for n, t in at.items()} for path, at in adapter.tensors.items()}
    next(iter(tensors["up"].values()))[0, 0] = value
    good = native(adapter)["mine.safetensors"]
    spoilt = bytearray(good)
    spoilt[-4:] = torch.tensor(value).numpy().tobytes()
    return alone(bytes(spoilt))


def many_tensors() -> Files:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    metadata = header_of(file())["__metadata__"]
    metadata.pop("lorac_seal")
    header = {"__metadata__": metadata, **{f"tensors/{n}/w": entry for n in range(MANY)}}
    return alone(with_header(b"\0" * 8, json.dumps(header).encode()))


def huge_rank() -> Files:
    return edited(peft(made("m")), r=10**6)


def huge_rank_from_a_seed() -> Files:
    config = {
        "peft_type": "VERA",
        "r": 10**6,
        "target_modules": ["up"],
        "projection_prng_key": 0,
        "save_projection": False,
    }
    vectors = {
        "base_model.model.up.vera_lambda_b": torch.ones(24),
        "base_model.model.up.vera_lambda_d": torch.ones(10**6),
    }
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: tensor_file({n: t[:20_000] for n, t in vectors.items()})}


def configured(text: bytes) -> Files:
    return {**peft(made("m")), CONFIG: text}


ATTACKS: dict[str, tuple[Callable[[], Files], set[str]]] = {
    "a pickle": (lambda: {CONFIG: b"{}", "adapter_model.bin": b"\x80"}, {"unknown_format"}),
    "an artifact": (lambda: {"manifest.json": b"{}"}, {"unknown_format"}),
    "an onnx_adapter": (lambda: {"x.onnx_adapter": b"\0"}, {"unknown_format"}),
    "no file": (lambda: {}, {"unknown_format"}),
    "a file too many": (lambda: {**peft(made("m")), "x.py": b""}, {"unknown_format"}),
    "an archive": (zip_bomb, {"unknown_format"}),
    "another format's file": (
        lambda: alone(tensor_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)})),
        {"unknown_format"},
    ),
    "nothing in the file": (lambda: alone(b""), {"unknown_format"}),
    "a header of 2^63 bytes": (lambda: alone(with_header(file(), length=1 << 63)), {"unknown_format"}),
    "a truncated file": (lambda: alone(file()[:-8]), {"corrupt_file"}),
    "a tensor larger than the file": (
        lambda: rewritten(lambda h: list(h.values())[1].update(shape=[10**6, 10**6])),
        {"corrupt_file"},
    ),
    "tensors that overlap": (
        lambda: rewritten(lambda h: list(h.values())[2].update(data_offsets=list(h.values())[1]["data_offsets"])),
        {"corrupt_file"},
    ),
    "changed values": (lambda: alone(file()[:-1] + b"\0"), {"corrupt_file"}),
    "values that are NaN": (lambda: not_finite(float("nan")), {"non_finite"}),
    "values that are infinite": (lambda: not_finite(float("-inf")), {"non_finite"}),
    "a rank of a million": (huge_rank, {"shape_mismatch"}),
    "a rank of a million, drawn from a seed": (huge_rank_from_a_seed, {"base_needed", "over_budget", "shape_mismatch"}),
    "a rank above the quota": (lambda: native(made("r", r=3)), {"over_quota"}),
    "a rank above the room": (lambda: native(made("r", r=7)), {"needs_recompile"}),
    "sites above the quota": (lambda: native(made("s", targets=("up", "down", "head"))), {"over_quota"}),
    "a hundred thousand tensors": (
        many_tensors,
        {"over_quota", "site_not_found", "unused_tensors", "shape_mismatch", "over_budget"},
    ),
    "a site that the model lacks": (rewritten_site, {"site_not_found", "corrupt_file"}),
    "a key twice": (lambda: configured(b'{"peft_type": "LORA", "peft_type": "IA3"}'), {"corrupt_file"}),
    "a number that is NaN": (lambda: configured(b'{"peft_type": "LORA", "r": NaN}'), {"corrupt_file"}),
    "brackets without end": (lambda: configured(b'{"r": ' + 100_000 * b"["), {"corrupt_file"}),
    "half of a surrogate pair": (lambda: configured(b'{"peft_type": "\\ud800"}'), {"corrupt_file"}),
    "a pattern that takes for ever": (
        lambda: edited(peft(made("m")), target_modules="(a|aa|u|up|d|do|w|n)+(p|wn)+$" * 40),
        {"pattern_too_slow", "corrupt_file", "unsupported_field", "unused_tensors", "site_not_found"},
    ),
    "experts elsewhere": (
        lambda: edited(peft(made("m")), peft_type="XLORA", adapters={"0": "/etc"}),
        {"corrupt_file", "unknown_field", "unsupported_field", "unreadable"},
    ),
    "a method of somebody's own": (lambda: recorded(variant="mine", modules={"mine": "os"}), {"unknown_method"}),
    "an unknown field": (lambda: recorded(code="import os"), {"unknown_field"}),
}


SLOW = {"a hundred thousand tensors"}


@pytest.mark.medium("formats/test_budget.py's bombs", cases=["an archive"])
@pytest.mark.parametrize("attack", [pytest.param(a, marks=[pytest.mark.slow] if a in SLOW else []) for a in ATTACKS])
def test_rejects_attacks_and_leaves_no_files(store: AdapterStore, tenant: str, attack: str) -> None:
    files, codes = ATTACKS[attack]
    with pytest.raises(lorac.LoracError) as refused:
        send(store, tenant, "mine", files())
    assert refused.value.code in codes, refused.value
    assert str(store._folder.path) not in str(refused.value)
    assert left(store, tenant) == ([], [], [], {}, 0, 0)
    assert log_of(store, tenant)[-1]["outcome"] == refused.value.code


# ── Other tenants ────────────────────────────────────────────────────────────────────────────────────────────────────
def test_nobody_reaches_anothers_adapter(store: AdapterStore, tenant: str) -> None:
    key = send(store, tenant, "salaries", native(made("m"))).key
    other = f"{tenant}-b"
    for name in ("salaries", key, f"{tenant}/salaries", f"../{tenant}/salaries", "salarie"):
        with refuses("adapter_not_found") as refused:
            store.find(other, name)
        assert refused.value.nearest in (None, "shared")
        with refuses("adapter_not_found"):
            store.unload(other, name)
    assert [one.name for one in store.adapters(other)] == ["shared"]
    assert store.find(tenant, "salaries") == key


# ── Paths ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def incoming(store: AdapterStore, tenant: str, tmp_path: Path) -> Path:
    """The tenant's folder with ways out of it."""
    folder = store._folder.incoming(tenant)
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(file())
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "peft").mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / "peft" / name).symlink_to(tmp_path / "secret.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "empty").mkdir()
    return folder


def test_no_path_leaves_the_tenants_folder(store: AdapterStore, tenant: str, incoming: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    paths = (
        str(secret),
        "../other/x.safetensors",
        "a/../../x",
        "link.safetensors",
        "linked/secret.safetensors",
        "peft",
        "pipe.safetensors",
        "empty",
        "missing.safetensors",
        "",
        ".",
        "a\0b",
        "/",
        "\\\\host\\x",
        9 * 1000 * "a",
    )
    for path in paths:
        with refuses("unreadable"):
            store.load(tenant, "mine", path)
    assert {line["outcome"] for line in log_of(store, tenant)} == {"unreadable"}


def test_a_path_that_is_exchanged_meanwhile_leads_nowhere_else(incoming: Path, tmp_path: Path) -> None:
    own, away = incoming / "own", incoming / "away"
    own.mkdir()
    (own / "x.safetensors").write_bytes(b"own")
    (tmp_path / "x.safetensors").write_bytes(b"secret")
    away.symlink_to(tmp_path)
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            for one, other in ((own, incoming / "kept"), (away, own), (own, away), (incoming / "kept", own)):
                os.rename(one, other)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        found = {contents(incoming) for _ in range(2000)}
    finally:
        stop.set()
        thread.join()
    assert b"secret" not in found


def contents(folder: Path) -> bytes:
    try:
        with open_files(folder, "own/x.safetensors") as files:
            return files["x.safetensors"].read()
    except lorac.FormatError:
        return b""


def test_a_stored_file_that_is_replaced_is_not_read(store: AdapterStore, tenant: str) -> None:
    added = send(store, tenant, "mine", native(made("m")))
    path = store._folder.file_of(tenant, added.digest)
    path.write_bytes(native(made("n", seed=1))["mine.safetensors"])
    with refuses("corrupt_file", match="was changed since it was registered"):
        answer(store._compiled, adapters=added.key)
    path.unlink()
    path.symlink_to("/etc/passwd")
    with refuses("unreadable"):
        answer(store._compiled, adapters=added.key)


# ── Quotas ───────────────────────────────────────────────────────────────────────────────────────────────────────────
class _Endless(io.RawIOBase):
    """A body that never ends, whatever length it announced."""

    sent = 0

    def read(self, size: int = -1, /) -> bytes:
        self.sent += size
        return bytes(size)


def test_a_body_without_end_stops_at_the_quota(store: AdapterStore, tenant: str) -> None:
    body: Any = _Endless()
    with refuses("quota_full", match=f"{QUOTAS.bytes} bytes"):
        store.upload(tenant, "mine", {"x.safetensors": body})
    assert body.sent <= QUOTAS.bytes + (1 << 20)
    assert left(store, tenant) == ([], [], [], {}, 0, 0)


def test_threads_do_not_pass_a_quota_together(store: AdapterStore, tenant: str) -> None:
    def upload(number: int) -> str:
        try:
            send(store, tenant, f"n{number}", native(made("q", seed=number % 5)))
        except lorac.OverBudget as error:
            return error.code
        return "done"

    with ThreadPoolExecutor(8) as threads:
        codes = [*threads.map(upload, range(8))]
    own = store._tenants[tenant]
    assert (codes.count("done"), codes.count("quota_full")) == (QUOTAS.adapters, 8 - QUOTAS.adapters)
    sizes = {one.digest: one.nbytes for one in own.adapters.values()}
    assert (own.account.adapters, own.account.bytes) == (QUOTAS.adapters, sum(sizes.values()))
    for name in [*own.adapters]:
        store.unload(tenant, name)
    assert left(store, tenant) == ([], [], [], {}, 0, 0)


def test_a_name_that_is_given_up_meanwhile_counts_again(store: AdapterStore, tenant: str) -> None:
    class Body(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if "mine" in store._tenants[tenant].adapters:
                store.unload(tenant, "mine")
            return super().read(size)

    send(store, tenant, "mine", native(made("m")))
    store.upload(tenant, "mine", {"x.safetensors": Body(file())})
    assert store._tenants[tenant].account.adapters == 1
    store.unload(tenant, "mine")
    assert left(store, tenant) == ([], [], [], {}, 0, 0)


def test_uploads_are_counted_whether_they_succeed_or_not(store: AdapterStore, tenant: str) -> None:
    for _ in range(QUOTAS.uploads_per_minute):
        with refuses("unknown_format"):
            send(store, tenant, "mine", {})
    with refuses("too_many_uploads", match="upload again in"):
        send(store, tenant, "mine", native(made("m")))
    send(store, f"{tenant}-b", "mine", native(made("m")))
