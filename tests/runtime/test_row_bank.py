"""Rows of a running batch, each with adapters of its own that are written once, answer as they would alone."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.ir.slots.choice import parse_choice
from lorac.target.kv_cache import DecodeStep
from lorac.testing import assert_close
from tests.decoders import DECODERS, IDS
from tests.refusing import refuses

CHOICES: list[Any] = ["one", "two", {"one": 0.7, "two": 0.3}, None]


@pytest.fixture(scope="module")
def compiled(llama_folder: Path) -> Any:
    return lorac.load(llama_folder)


def decoded(bound: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    counts = [ids.shape[1]] * len(ids)
    step = DecodeStep(ids=ids, counts=counts, wanted=torch.full((len(ids), 1), ids.shape[1] - 1))
    found: torch.Tensor = bound.decode("main", cache, step)[:, 0]
    return found


def answers(compiled: Any, bank: Any) -> torch.Tensor:
    return decoded(bank.bound(2), compiled.engine.new_cache("main", 2, 12), IDS)


@pytest.mark.medium("the scheduler's requests, over the same bank")
@torch.no_grad()
def test_rows_with_adapters_of_their_own_come_and_go(compiled: Any) -> None:
    generator = random.Random(3)
    states = [compiled.switch.states.of(parse_choice(choice, compiled.pool)) for choice in CHOICES]
    expected = [compiled(input_ids=IDS[:1], adapters=choice).logits[0] for choice in CHOICES]
    bank, cache, rows = compiled.switch.new_row_bank(4), compiled.engine.new_cache("main", 0, 12), list[int]()
    for _ in range(40):
        if len(rows) < 4 and generator.random() < 0.5:
            choice = generator.randrange(len(CHOICES))
            prompt = compiled.engine.new_cache("main", 1, 12)
            decoded(states[choice].bound, prompt, IDS[:1, :3])
            bank.admit(len(rows), states[choice])
            cache.join(prompt)
            rows.append(choice)
        ended = {place for place, length in enumerate(cache.lengths) if length == 10 or generator.random() < 0.1}
        rows = [rows[row] for row in cache.remove(ended)]
        for place, choice in enumerate(rows):
            bank.admit(place, states[choice])
        if rows:
            places = torch.tensor(cache.lengths)
            logits = decoded(bank.bound(len(rows)), cache, IDS[0, places][:, None])
            alone = torch.stack([expected[row][place] for row, place in zip(rows, places, strict=True)])
            assert_close(logits, alone)


@torch.no_grad()
def test_admitting_a_row_moves_no_bit_of_another_and_leaves_no_stale_rank(compiled: Any) -> None:
    one, two, base = (compiled.switch.states.of(parse_choice(choice, compiled.pool)) for choice in ("one", "two", None))
    used, bank = compiled.memory.used, compiled.switch.new_row_bank(2)

    bank.admit(0, one)
    bank.admit(1, one)
    before = answers(compiled, bank)
    bank.admit(1, two)
    between = answers(compiled, bank)
    assert torch.equal(between[0], before[0])
    assert not torch.equal(between[1], before[1])
    bank.admit(1, one)
    assert torch.equal(answers(compiled, bank), before)
    bank.admit(1, base)
    assert_close(answers(compiled, bank)[1], compiled(input_ids=IDS, adapters=None).logits[1, -1])
    assert compiled.memory.used > used
    del bank
    gc.collect()
    assert compiled.memory.used == used


def test_admits_an_adapter_with_one_copy_per_shape(compiled: Any) -> None:
    bank, state = compiled.switch.new_row_bank(3), compiled.switch.states.of(parse_choice("one", compiled.pool))
    bank.admit(1, state)
    tensors = state.bound.placed_tensors()
    shapes = {tensors[name].shape[1:] for name in tensors if name.endswith((":a", ":b"))}
    assert len([one for one, _ in bank._copies[state.snapshot] if one.shape[1:] in shapes]) == len(shapes)
    assert all(torch.equal(bank._places.by_slot[name][1], tensor[0]) for name, tensor in tensors.items())


def test_rejects_a_bank_for_eager() -> None:
    with refuses("unavailable", match="cannot keep the adapters of a running batch"):
        lorac.compile(DECODERS["llama"](), lorac.LoRA(r=1, targets=["q_proj"])).switch.new_row_bank(2)
