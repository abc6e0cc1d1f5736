"""``push_to_hub``: adapters and compiled models with their cards, on a stub of the hub, and back."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lorac
from tests.hub import Hub, child_environment, read_files, use_hub
from tests.mistakes import Tiny, example, lora
from tests.refusing import refuses

TOKEN = "hf_" + "x" * 34


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    with Hub() as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def fill(compiled: lorac.Compiled) -> None:
    torch.manual_seed(1)
    for adapter in compiled.adapters.values():
        for tensor in adapter.parameters():
            nn.init.normal_(tensor)


def read_card(hub: Hub, name: str, revision: str = "main") -> str:
    return hub.repositories[name].commits[revision]["README.md"].decode()


def read_snippet(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_pushes_an_adapter_and_loads_it_back(hub: Hub) -> None:
    model = Tiny().eval()
    compiled = lorac.compile(model, {"mine": lora()})
    fill(compiled)
    adapter = compiled.adapters["mine"]
    address = adapter.push_to_hub("ann/sql", model=model, base_model="ann/tiny", license="apache-2.0", message="first")
    assert "/commit/" in address
    assert hub.commits[-1]["summary"] == "first"
    loaded = lorac.load_adapter("ann/sql", model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), adapter.parameters(), strict=True))
    card = read_card(hub, "ann/sql")
    facts = (
        "license: apache-2.0",
        "base_model: ann/tiny",
        "lora r=",
        loaded.provenance["base"],
        *loaded.sites[:3],
    )
    for part in facts:
        assert part in card
    files = hub.repositories["ann/sql"].commits["main"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    exec(read_snippet(card), {})


def test_pushes_a_method_that_peft_lacks_in_the_own_format(hub: Hub) -> None:
    compiled = lorac.compile(Tiny().eval(), {"mine": lorac.DyLoRA(r=2, targets=["q_proj"])})
    compiled.adapters["mine"].push_to_hub("ann/own", private=True, revision="v2", format="native")
    assert hub.repositories["ann/own"].token == TOKEN
    card = read_card(hub, "ann/own", "v2")
    assert "ann/own/adapter.safetensors@v2" in card
    exec(read_snippet(card), {})


def test_pushes_a_compiled_model_and_loads_it_back(hub: Hub) -> None:
    compiled = lorac.compile(Tiny().eval(), {"mine": lora(), "other": lora()}, active="mine", example_inputs=example())
    fill(compiled)
    compiled.push_to_hub("ann/compiled", base_model="ann/tiny")
    compiled.save("folder")
    assert torch.equal(lorac.load("ann/compiled")(**example()), lorac.load("folder")(**example()))
    card = read_card(hub, "ann/compiled")
    assert "| `other`, method | lora" in card
    assert "base_model: ann/tiny" in card
    exec(read_snippet(card), {})


def test_writes_nothing_without_a_token_or_with_a_wrong_argument(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny().eval()
    push = partial(lorac.compile(model, {"mine": lora()}).adapters["mine"].push_to_hub, model=model)
    with refuses("option_error", match="push_to_hub has no argument 'licence'\n  nearest: license"):
        push("ann/sql", licence="mit")
    with refuses("unreadable", match="cannot be written on the hub"):
        push("no name at all")
    monkeypatch.delenv("HF_TOKEN")
    with refuses("unreadable", match="log in: hf auth login, or HF_TOKEN"):
        push("ann/sql")
    assert not hub.repositories
    push("ann/sql", token=TOKEN)


@pytest.mark.medium("runs the snippet of a card in a process of its own")
def test_the_snippet_of_a_card_runs_in_a_new_process(hub: Hub, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    hub.add("ann/base", read_files(tmp_path / "base"))
    model = transformers.AutoModelForCausalLM.from_pretrained("ann/base")
    compiled = lorac.compile(model, {"mine": lorac.LoRA(r=2, targets=["q_proj"])})
    fill(compiled)
    compiled.adapters["mine"].push_to_hub("ann/sql", model=model)
    snippet = read_snippet(read_card(hub, "ann/sql"))
    assert "LlamaForCausalLM.from_pretrained('ann/base')" in snippet
    (tmp_path / "work").mkdir()
    ran = subprocess.run(
        [sys.executable, "-c", snippet],
        env=child_environment(hub, tmp_path / "cache"),
        cwd=tmp_path / "work",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "adapters: sql (lora r=2" in ran.stdout
