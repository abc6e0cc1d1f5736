"""Trans-LoRA with a real model that writes the prompts itself: a LoRA's answers, learnt by a DoRA."""

from __future__ import annotations

from typing import Any

import pytest

import lorac
from lorac.training import transfer
from lorac.training.transfer import Settings, Task
from tests.zoo import ZOO, tokenizer

ANIMALS = ("cat", "dog", "horse", "cow", "lion", "tiger", "bear", "wolf", "fox", "sheep", "goat", "duck")
PLACES = ("kitchen", "forest", "garden", "city", "river", "house", "field", "school", "zoo", "barn")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
OTHER = ("What is 7 times 8?", "Who wrote Hamlet?", "How far away is the sun?", "Name a prime number above 50.")


def questions(count: int) -> list[str]:
    """Questions of the source's data."""
    return [f"Where is the {ANIMALS[i % 12]}?" for i in range(count)]


def compiled(**adapters: Any) -> Any:
    made = lorac.compile(ZOO["smollm2"].fresh(), adapters)
    made.tokenizer = tokenizer("smollm2")
    return made


@pytest.mark.slow
def test_a_real_model_passes_on_what_it_was_taught() -> None:
    """It was taught to answer every question where an animal is with a place in brackets."""
    source = compiled(source=lorac.LoRA(r=8, alpha=16, targets=ALL), discriminator=lorac.LoRA(r=8, targets=ALL))
    asked = questions(24)
    own = [(question, f" [[{PLACES[i % 10]}]]") for i, question in enumerate(asked)]
    tokens = source.tokenizer
    transfer.fit(source, transfer.taught(tokens, own, rows=8, epochs=6), adapters="source", lr=1e-3)
    task = Task(name="animals", seeds=tuple(asked[:5]), instruction="Questions about where animals are.")
    transfer.train_discriminator(source, task, asked[:12], OTHER * 3, epochs=3, lr=1e-3)
    accept = transfer.accepted_by(source, task, adapters="discriminator")
    assert sum(accept(questions(12))) >= 11 and sum(accept(OTHER)) <= 1

    target = compiled(target=lorac.DoRA(r=8, alpha=16, targets=ALL))
    held = ["Where is the elephant?", "Where is the rabbit?", "Where is the old crow?"]

    def bracketed(model: Any, adapters: Any) -> int:
        said = transfer.continuations(model, held, adapters=adapters, max_new_tokens=8, do_sample=False)
        return sum(answer.startswith(" [[") and "]]" in answer for answer in said)

    assert bracketed(source, "source") == 3 and bracketed(target, "target") == 0
    settings = Settings(count=16, tries=160, max_new_tokens=16, epochs=8, lr=1e-3)
    found = transfer.transfer(source, target, task, settings=settings)
    assert len(found.pairs) == 16 and len({prompt for prompt, _ in found.pairs}) == 16
    assert not {prompt for prompt, _ in found.pairs} & set(held)
    assert bracketed(target, "target") == 3
