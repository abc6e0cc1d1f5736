"""A server answers with PEFT's prompts, of its program and uploaded ones, beside the base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import httpx2
import peft
import pytest

import lorac
from tests.decoders import DECODERS
from tests.runtime.generation.prompted import CAUSAL, save_prompt
from tests.serving.models import alone, make_app, make_tokenizer, serve

TEXT = "what the base has read before"
CONFIGS: dict[str, Any] = {
    "tokens": peft.PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "keys": peft.PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_serves_prompts_of_peft(name: str, tmp_path: Path) -> None:
    host, tokenizer = DECODERS["llama"](), make_tokenizer()
    save_prompt(host, CONFIGS[name], tmp_path / "files" / name)
    save_prompt(host, peft.PromptTuningConfig(num_virtual_tokens=5, **CAUSAL), tmp_path / "other")
    options: dict[str, Any] = {"target": "onnxruntime", "cache": True, "active": None, "self_test": False}
    compiled = lorac.compile(copy.deepcopy(host), {"own": tmp_path / "other"}, **options)
    compiled.tokenizer = tokenizer
    compiled.register(tmp_path / "files")
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = {one: alone(compiled, TEXT, one, **asked) for one in ("own", name)}
    expected["base"] = alone(compiled, TEXT, None, **asked)
    assert expected["base"] not in {expected["own"], expected[name]}
    with serve(make_app(compiled)) as address, httpx2.Client(base_url=address) as client:
        for one in ("base", "own", name, "base", name):
            body = {"model": one, "prompt": TEXT, "max_tokens": 6, "temperature": 0}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == expected[one]
