"""SmolLM2 with PEFT's adapters: the tokens of PEFT's own model, by the same logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, ShiraConfig
from torch import Tensor

import lorac
from lorac.frontend.components import MAIN_GRAPH
from lorac.target.kv_cache import DecodeStep
from tests import limits, parity
from tests.peft_files import configure, load_peft, make_peft
from tests.zoo import ZOO, tokenizer

pytestmark = pytest.mark.slow("runtime/generation compares the tokens of tiny models")

CONFIGS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "dora": LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj", "gate_proj"]),
    "shira": ShiraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], random_seed=7),
}
LENGTH, PIECE = 48, 50
"""Tokens of a prompt, and how many are read at a time where a cache is filled."""


@dataclass(frozen=True, eq=False)
class Reference:
    """What PEFT's model of a file writes.

    Attributes:
        tokens: (rows, steps).
        logits: (rows, steps, vocabulary): what each token was chosen by.
        base: the same of the base alone, which reads the same tokens.
    """

    tokens: Tensor
    logits: Tensor
    base: Tensor


def prompts(rows: int) -> Tensor:
    """Python's manual, a topic in each row, as token ids."""
    texts = [topics[name] for name in sorted(topics)]
    ids = [tokenizer("smollm2")(text)["input_ids"][:LENGTH] for text in texts]
    return torch.tensor([row for row in ids if len(row) == LENGTH][:rows])


@pytest.fixture(scope="module")
def host() -> Any:
    """SmolLM2, of which no text ends by itself."""
    model: Any = ZOO["smollm2"].fresh()
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def reference(host: Any, name: str, folder: Path, ids: Tensor, new: int) -> Reference:
    """Save an adapter by PEFT and generate with it; the logits are mapped from a file, since they take gigabytes."""
    oracle: Any = make_peft(
        host, folder / name, CONFIGS[name], inputs={"input_ids": ids[:2]}, outputs=("logits",), contribution=0.15
    )
    with torch.no_grad():
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
        found = oracle.generate(input_ids=ids, **options, return_dict_in_generate=True, output_logits=True)
        base = torch.cat([host(input_ids=row[None]).logits[:, LENGTH - 1 : -1] for row in found.sequences])
    torch.save((found.sequences[:, LENGTH:], torch.stack(found.logits, 1), base), folder / f"{name}.pt")
    return Reference(*torch.load(folder / f"{name}.pt", mmap=True))


def read(compiled: Any, choice: Any, ids: Tensor, new: int) -> Tensor:
    """Logits (1, new, vocabulary) of the last tokens of a text (1, length); through a cache, where there is one."""
    if compiled.engine.cache_spec(MAIN_GRAPH) is None:
        with torch.no_grad():
            return compiled(input_ids=ids, adapters=choice).logits[:, -new:]
    cache = compiled.engine.new_cache(MAIN_GRAPH, 1, ids.shape[1])

    def pieces(bound: Any, _: Any) -> Iterator[Tensor]:
        for piece in ids.split(PIECE, 1):
            every = torch.arange(piece.shape[1])[None]
            yield bound.decode(MAIN_GRAPH, cache, DecodeStep(ids=piece, counts=[piece.shape[1]], wanted=every)).clone()

    found: list[Tensor] = compiled.switch.with_choice(choice, lambda bound, state: list(pieces(bound, state)))
    return torch.cat(found, 1)[:, -new:]


def compare(compiled: Any, name: str, ids: Tensor, wanted: Reference) -> None:
    """Hold a compiled model's text and logits against the reference's."""
    rows, new = wanted.tokens.shape
    mask, choice = torch.ones_like(ids), ({} if compiled.mode == "baked" else {"adapters": name})
    found = compiled.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **choice)
    held = limits.assert_same_text(found[:, LENGTH:], wanted.tokens, wanted.logits)
    ratios = []
    for row in range(rows):
        text = torch.cat([ids[row], wanted.tokens[row, :-1]])[None]
        expected, base = wanted.logits[row, None], wanted.base[row, None]
        own = None if compiled.mode == "baked" else {"logits": read(compiled, None, text, new)}
        answer = {"logits": read(compiled, compiled.active if own is None else name, text, new)}
        ratios.append(parity.assert_parity(answer, {"logits": expected}, {"logits": base}, own_base=own)["logits"])
    where = f"{compiled.engine.target} {compiled.mode} {name}"
    print(f"{where}: {held} of {wanted.tokens.numel()} tokens held, the others behind near ties; {max(ratios):.1e}")


def test_in_eager(host: Any, tmp_path: Path) -> None:
    ids = prompts(3)
    wanted = reference(host, "lora", tmp_path, ids, 12)
    compare(lorac.compile(host, {"lora": tmp_path / "lora"}), "lora", ids, wanted)


@pytest.mark.slow
def test_in_onnxruntime(host: Any, tmp_path: Path) -> None:
    ids = prompts(20)
    wanted = {name: reference(host, name, tmp_path, ids, 200) for name in CONFIGS}
    adapters = {name: tmp_path / name for name in CONFIGS}
    for mode in ("live", "fused"):
        compiled = lorac.compile(host, adapters, target="onnxruntime", cache=True, mode=mode, self_test=False)
        for name in CONFIGS:
            compare(compiled, name, ids, wanted[name])
    for name, path in adapters.items():
        compiled = lorac.compile(host, {name: path}, target="onnxruntime", cache=True, mode="baked", self_test=False)
        compare(compiled, name, ids, wanted[name])


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_an_activated_lora_writes_as_pefts(host: Any, tmp_path: Path, target: str) -> None:
    """From the same last token of each prompt but the last row's, which never has it."""
    ids = prompts(4)
    token = int(ids[0, LENGTH // 2])
    ids[1:][ids[1:] == token] += 1
    ids[1, 9], ids[1, 40], ids[2, 0] = token, token, token
    config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear")
    inputs: Any = {"inputs": {"input_ids": ids[:2]}, "outputs": ("logits",)}
    make_peft(host, tmp_path / "alora", config, contribution=0.15, **inputs)
    configure(tmp_path / "alora", alora_invocation_tokens=[token])
    oracle: Any = load_peft(host, tmp_path / "alora")
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = oracle.generate(input_ids=ids, **options, return_dict_in_generate=True, output_logits=True)
    more = {"cache": True, "self_test": False} if target == "onnxruntime" else {}
    compiled = lorac.compile(host, {"alora": tmp_path / "alora"}, target=target, **more)
    tokens = compiled.generate(ids, **options)
    limits.assert_same_text(tokens[:, LENGTH:], found.sequences[:, LENGTH:], torch.stack(found.logits, 1))
    base = compiled.generate(ids, adapters=None, **options)
    assert [torch.equal(*pair) for pair in zip(base, tokens, strict=True)] == [False, False, False, True]
