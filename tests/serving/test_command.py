"""The command `lorac serve`: its options are the settings, and it serves what it says."""

from __future__ import annotations

import dataclasses
import gc
import re
import socket
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from typer.testing import CliRunner

import lorac
from lorac.cli import app
from lorac.serving import ServingSettings, build_app, run, server
from lorac.serving.store import StoreQuotas
from tests.decoders import DECODERS, IDS
from tests.refusing import refuses
from tests.serving.models import make_tokenizer


def test_every_setting_is_an_option(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(server, "run", lambda folder, settings, *_, **more: given.update(more, settings=settings))
    keys = tmp_path / "keys.json"
    keys.write_text('{"k": "alice"}')
    values = {
        **{"rows": 3, "waiting": 5, "chunk": 16, "name": "m", "max_body_bytes": 7, "max_upload_bytes": 8, "memory": 99},
        **{"max_images": 13, "max_image_bytes": 14, "max_image_pixels": 15},
        **{"max_spool_bytes": 9, "max_connections": 10, "header_timeout": 1.5, "body_timeout": 2.5, "max_tokens": 11},
        **{
            "deadline": 3.5,
            "pin": "one",
            "allow_source": "hf:ann/*",
            "max_output_bytes": 12,
            "grace": 6.5,
            "pooling": "cls",
            "keys": keys,
            "metrics_port": 4,
        },
    }
    options = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    more = ["--predict", "--no-page", "--trust", "--quota", "rank=4", "--quota", "seconds=2"]
    done = CliRunner().invoke(app, ["serve", str(tmp_path), *options, *more])
    assert done.exit_code == 0, done.output
    renamed = {"name": "base_name", "max_tokens": "max_new_tokens", "pin": "pinned", "allow_source": "sources"}
    expected = {renamed.get(name, name): value for name, value in values.items() if name != "metrics_port"}
    expected |= {"keys": {"k": "alice"}, "pinned": ("one",), "sources": ("hf:ann/*",), "predict": True, "page": False}
    assert dataclasses.asdict(given["settings"]) == expected
    assert (given["quotas"], given["metrics_port"], given["trust"]) == (StoreQuotas(rank=4, seconds=2), 4, True)
    assert CliRunner().invoke(app, ["serve", str(tmp_path)]).exit_code == 0
    assert (given["settings"], given["trust"]) == (ServingSettings(), False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "0"], "--rows cannot be 0\n  it takes numbers from 1"),
        (["--max-tokens", "-1"], "--max-tokens cannot be -1\n  it takes numbers from 1"),
        (["--quota", "rank=0"], "--quota takes no rank=0\n  it takes numbers from 1"),
    ],
)
def test_rejects_values_in_the_words_of_the_command_line(words: list[str], message: str, tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["serve", str(tmp_path), *words]).exception
    assert (type(refused), str(refused)) == (lorac.OptionError, message)


@pytest.mark.filterwarnings("ignore:Duplicate Operation ID:UserWarning")
def test_rejects_a_model_that_it_would_serve_nothing_of() -> None:
    host = DECODERS["llama"]()
    compiled = lorac.compile(host, {"one": lorac.LoRA(r=2, targets=["q_proj"])}, example_inputs={"input_ids": IDS})
    compiled.tokenizer = make_tokenizer()
    with refuses("unavailable", match="predict=True"):
        build_app(compiled)
    paths = build_app(compiled, ServingSettings(predict=True)).openapi()["paths"]
    assert ("/v1/predict" in paths, "/v1/chat/completions" in paths) == (True, False)


def test_a_port_of_its_own_gives_metrics_without_a_key(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list[str]()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def ask(self: uvicorn.Server) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            found.append(answer.read().decode())

    monkeypatch.setattr(uvicorn.Server, "run", ask)
    compiled = lorac.load(llama_folder)
    compiled.tokenizer = make_tokenizer()
    loaded = dict[str, Any]()
    monkeypatch.setattr(lorac, "load", lambda folder, **options: loaded.update(options) or compiled)
    run(llama_folder, ServingSettings(keys={"k": "alice"}), port=0, metrics_port=port, trust=True)
    assert loaded == {"trust": True}
    assert re.search(r"^vllm:num_requests_running", found[0], re.M)


def test_tunes_the_process_of_the_command_alone(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen, interval, found = gc.get_freeze_count(), sys.getswitchinterval(), list[tuple[float, int]]()
    monkeypatch.setattr(uvicorn.Server, "run", lambda _: found.append((sys.getswitchinterval(), gc.get_freeze_count())))
    compiled = lorac.load(llama_folder)
    compiled.tokenizer = make_tokenizer()
    monkeypatch.setattr(lorac, "load", lambda folder, **_: compiled)
    try:
        run(llama_folder, port=0)
        done = CliRunner().invoke(app, ["serve", str(llama_folder), "--port", "0"])
    finally:
        sys.setswitchinterval(interval)
    assert done.exit_code == 0, done.output
    assert found[0][0] == interval
    assert found[0][1] <= frozen, "objects that another test froze may die, and no more are frozen"
    assert found[1][0] < interval
    assert found[1][1] > frozen


@pytest.mark.parametrize("name", ["port", "metrics_port"])
def test_rejects_a_port_where_another_listens_before_it_loads(name: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = {"port": 0, name: other.getsockname()[1]}
        with refuses("option_error", match=f"(?s)no server can listen at 127.0.0.1:{taken[name]}.*in use.*{name}="):
            run(tmp_path / "no model is here", **taken)
