"""Adapters in a store, read by s3fs from moto's server on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

import lorac
from tests.refusing import refuses

pytestmark = pytest.mark.slow("s3fs and moto[server], which development does not bring")
FILES = ("adapter_config.json", "adapter_model.safetensors")


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)).eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, lorac.Adapter]:
    compiled = lorac.compile(make_model(), {"sql": lorac.LoRA(r=2, targets=["0", "2"])})
    for tensor in compiled.adapters["sql"].parameters():
        tensor.data.normal_()
    folder = tmp_path_factory.mktemp("stores") / "sql"
    lorac.save_adapter(compiled.adapters["sql"], folder, model=make_model())
    return folder, compiled.adapters["sql"]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto is not installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield fsspec.filesystem("s3", skip_instance_cache=True)
    running.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_reads_an_adapter_from_a_store(
    s3: Any, adapter: tuple[Path, lorac.Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    s3.mkdir("team")
    folder, made = adapter
    for name in FILES:
        s3.pipe_file(f"team/sql/{name}", (folder / name).read_bytes())
        s3.pipe_file(f"team/sql-old/{name}", b"not this one")

    read = lorac.load_adapter("s3://team/sql", make_model())

    x = torch.ones(1, 6)
    answers = [lorac.compile(make_model(), {"a": one}, active="a")(x) for one in (read, made)]
    assert torch.equal(*answers)
    with refuses("unreadable", match="has nothing that lorac reads"):
        lorac.load_adapter("s3://team/other", make_model())
    with refuses("unreadable", match="cannot be read"):
        lorac.load_adapter("s3://nobodys-bucket/sql", make_model())
    with refuses("over_budget"), lorac.budget(download=100):
        s3.pipe_file("team/large/adapter_model.safetensors", bytes(200))
        lorac.load_adapter("s3://team/large", make_model())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert torch.equal(lorac.compile(make_model(), {"a": "s3://team/sql"}, active="a")(x), answers[0])
