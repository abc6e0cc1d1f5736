"""A server's list has the tokens from which on an adapter acts, and its requests share the base's prompt."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

import lorac
from lorac.backends.onnxruntime.engine import OrtProgram
from lorac.testing import adapter_away
from tests.decoders import DECODERS, IDS
from tests.serving.models import alone, make_app, make_tokenizer, serve

TEXT = "what the base has read before: judge"


def test_serves_an_adapter_with_invocation_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, tokenizer, fed = DECODERS["llama"](), make_tokenizer(), list[int]()
    adapter = adapter_away(lorac.LoRA(r=2, targets=["q_proj", "down_proj"]), host, IDS, name="judge", seed=3)
    tokens = tuple(tokenizer("judge")["input_ids"])
    adapter.variant = replace(adapter.variant, invocation_tokens=tokens)
    lorac.save_adapter(replace(adapter, name="kept"), tmp_path / "files" / "kept", model=host)
    compiled = lorac.compile(host, [adapter], target="onnxruntime", cache=True, active=None, self_test=False)
    compiled.tokenizer = tokenizer
    compiled.register(tmp_path / "files")
    expected = alone(compiled, TEXT, "judge", max_new_tokens=6, do_sample=False)
    assert expected != alone(compiled, TEXT, None, max_new_tokens=6, do_sample=False)
    decode = OrtProgram.decode

    def record(self: OrtProgram, graph: str, cache: Any, step: Any) -> torch.Tensor:
        fed.append(sum(step.counts))
        return decode(self, graph, cache, step)

    with serve(make_app(compiled)) as address, httpx2.Client(base_url=address) as client:
        listed = {one["id"]: one.get("invocation_tokens") for one in client.get("/v1/models").json()["data"]}
        assert listed == {"base": None, "judge": list(tokens), "kept": list(tokens)}
        assert client.get("/v1/models/kept").json()["invocation_tokens"] == list(tokens)
        body = {"model": "base", "prompt": TEXT, "max_tokens": 6, "temperature": 0}
        assert client.post("/v1/completions", json=body).status_code == 200
        monkeypatch.setattr(OrtProgram, "decode", record)
        for name in ("judge", "kept"):
            answer = client.post("/v1/completions", json={**body, "model": name}).json()
            assert answer["choices"][0]["text"] == expected
        assert sum(fed) == 2 * (len(tokens) + 5)


def test_eight_requests_have_eight_adapters_with_tokens_of_their_own() -> None:
    host, tokenizer = DECODERS["llama"](), make_tokenizer()
    names = [f"judge{letter}" for letter in "abcdefgh"]
    made = [
        adapter_away(lorac.LoRA(r=2 + i % 2, targets=["q_proj", "down_proj"]), host, IDS, name=name, seed=i)
        for i, name in enumerate(names)
    ]
    for one in made:
        one.variant = replace(one.variant, invocation_tokens=tuple(tokenizer(one.name[-2:])["input_ids"]))
    compiled = lorac.compile(host, made, target="onnxruntime", cache=True, active=None, self_test=False)
    compiled.tokenizer = tokenizer
    texts = [f"{TEXT[:20]} {name[-2:]} {'x' * i}" for i, name in enumerate(names)]
    given = list(zip(texts, names, strict=True))
    expected = [alone(compiled, text, name, max_new_tokens=6, do_sample=False) for text, name in given]
    bases = [alone(compiled, text, None, max_new_tokens=6, do_sample=False) for text in texts]
    assert sum(one != base for one, base in zip(expected, bases, strict=True)) > 5

    with serve(make_app(compiled)) as address, httpx2.Client(base_url=address) as client:

        def ask(pair: tuple[str, str]) -> str:
            body = {"model": pair[1], "prompt": pair[0], "max_tokens": 6, "temperature": 0}
            return str(client.post("/v1/completions", json=body).json()["choices"][0]["text"])

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, given)) == expected
