"""Adapters as tenants send them: whole ones, and files made wrong on purpose."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

import lorac
from lorac.serving.store import AdapterStore
from lorac.testing import adapter_away
from tests.runtime.switching import ENTRY, X, build

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOM = lorac.Reserve(targets=("up", "down", "head"), rank=6, adapters=2)
BASE_NAME = "acme/plain-mlp"
Files = Mapping[str, bytes]


def compiled() -> Any:
    """The host with room for adapters, and one of its own for everybody."""
    return build([made("shared", r=1, targets=("up",))], "eager", reserve=ROOM, active=None)


@functools.cache
def made(name: str, r: int = 2, targets: tuple[str, ...] = ("up", "down"), seed: int = 0) -> lorac.Adapter:
    """A LoRA away from its init."""
    return adapter_away(lorac.LoRA(r=r, targets=targets), ENTRY.fresh(torch.float32), X, name=name, seed=seed)


def host_with_other_weights() -> torch.nn.Module:
    """A model of the same shapes."""
    host = ENTRY.fresh(torch.float32)
    with torch.no_grad():
        for parameter in host.parameters():
            parameter.mul_(1.5)
    return host


def native(adapter: lorac.Adapter, host: torch.nn.Module | None = None) -> Files:
    """An adapter as a file of lorac's own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        lorac.save_adapter(adapter, path, format="native", model=host or ENTRY.fresh(torch.float32))
        return {"mine.safetensors": path.read_bytes()}


def peft(adapter: lorac.Adapter) -> Files:
    """An adapter as PEFT itself writes it: no seal, and no hash of the base but its name."""
    with tempfile.TemporaryDirectory() as folder:
        lorac.save_adapter(adapter, folder, model=ENTRY.fresh(torch.float32))
        tensors = safetensors.torch.load_file(Path(folder) / WEIGHTS)
        config = json.loads((Path(folder) / CONFIG).read_text())
    return {
        CONFIG: json.dumps({**config, "base_model_name_or_path": BASE_NAME}).encode(),
        WEIGHTS: tensor_file(tensors),
    }


def tensor_file(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file."""
    data: bytes = safetensors.torch.save(dict(tensors), metadata=metadata)
    return data


def with_header(file: bytes, header: bytes | None = None, length: int | None = None) -> bytes:
    """A safetensors file with another header, or one that claims another length."""
    own = int.from_bytes(file[:8], "little")
    header = file[8 : 8 + own] if header is None else header
    return (len(header) if length is None else length).to_bytes(8, "little") + header + file[8 + own :]


def header_of(file: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    found: dict[str, Any] = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return found


def edited(files: Files, **fields: Any) -> Files:
    """PEFT's files with other fields in the configuration."""
    return {**files, CONFIG: json.dumps({**json.loads(files[CONFIG]), **fields}).encode()}


@contextmanager
def opened(files: Files) -> Iterator[dict[str, BinaryIO]]:
    """Files as an upload gives them."""
    yield {name: io.BytesIO(data) for name, data in files.items()}


def send(store: AdapterStore, tenant: str, name: Any, files: Files, base: Any = None) -> Any:
    """Upload an adapter."""
    with opened(files) as given:
        return store.upload(tenant, name, given, base=base)


def log_of(store: AdapterStore, tenant: str) -> list[dict[str, Any]]:
    """What the audit log says of a tenant."""
    lines = [json.loads(line) for line in store._audit._path.read_text(encoding="ascii").splitlines()]
    return [line for line in lines if line["tenant"] == tenant]
