"""Does an adapter go over to a larger model without its data, and does filtering the prompts that it goes by help?

    python -m experiments.trans_lora [--seeds 4] [--steps 160] [--smoke]

Two Llamas over characters, of widths 32 and 48, know lists of questions of three characters, more than half of a list
of one of four kinds. A LoRA of the small one answers questions of the first kind by their last letter in capitals; a
second one tells such questions from those that the small model writes after four of them. All LoRAs are of the layers
and of the head, as the letters of a kind are alike to the host. From these four questions the large model writes a
hundred others, the small one answers them, and a LoRA of the large one learns the answers, or the probabilities of
their characters. Against the prompts that the filter takes stand unfiltered ones, and random characters of all kinds.
All are judged by a hundred questions of the first kind; "as good as the source" is taken as at most five more wrong.
A source that gets more than a tenth wrong is trained anew with another seed, and the large model learns three times as
long as the small one did: with a third of that, tried first, it was all but at chance on right answers.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Sequence
from typing import Any

import torch

import lorac
from experiments._char_lm import tokenizer
from experiments._finding import Expected, Finding, Table
from experiments._questions import KINDS, SIZE, host, questions
from experiments._study import Experiment, Losses, Question, answer, deciding, fewer, last, main
from lorac.training import transfer

OWN, COUNT, ROWS, HELD = KINDS[0], 100, 25, 100
SMALL, LARGE, HOSTS = 32, 48, 2
RATES, RATE = (1e-3, 3e-3, 1e-2), 3e-3
WORST, FEW = 0.1, 2
"""The share that a source may get wrong, and the steps of a smoke run, whose sources get all wrong."""
FILTERED, SOFT, UNFILTERED, RANDOM = "filtered", "filtered, probabilities", "unfiltered", "random"
SOURCE, NEAR = "the source", "the source, and 0.05"
WRONG = "wrong"
TASK = transfer.Task(
    name="d", seeds=("bad", "fgh", "ceg", "hab"), instruction="Write.", question=" {name}?", yes=":", no="."
)
LORA = lorac.LoRA(r=8, alpha=16, targets=r".*_proj|lm_head")


def speaking(model: Any, **adapters: lorac.LoRA) -> Any:
    """Return a model compiled with adapters and the tokenizer."""
    compiled: Any = lorac.compile(model, adapters)
    compiled.tokenizer = tokenizer()
    return compiled


@functools.cache
def source(seed: int, steps: int) -> Any:
    """Return the small model with the adapter that answers and the one that filters, the first of ten that succeeds."""
    for again in range(10 * seed, 10 * seed + 10):
        torch.manual_seed(again)
        compiled = speaking(host(SMALL, seed % HOSTS, 2 * steps), source=LORA, discriminator=LORA)
        real = questions(250, 10_000 + again)
        pairs = [(question, question[-1].upper()) for question in real]
        batches = transfer.make_training_batches(compiled.tokenizer, pairs, rows=ROWS, epochs=max(2 * steps // 5, 1))
        transfer.fit(compiled, batches, adapters="source", lr=RATE)
        if steps <= FEW or wrong(compiled, "source") <= WORST:
            break
    else:
        raise ValueError(f"ten sources of seed {seed} fail; give more steps")
    write = transfer.make_prompt_source(compiled, TASK, max_new_tokens=SIZE + 2)
    written = [text for start in range(4) for text in write(2 * ROWS, 10 * seed + start) if text]
    epochs = max(steps // 8, 1)
    transfer.train_discriminator(compiled, TASK, real[: 8 * ROWS], written, epochs=epochs, lr=RATE, rows=ROWS)
    return compiled


def every(texts: Sequence[str]) -> list[bool]:
    """Accept all prompts."""
    return [True] * len(texts)


@functools.cache
def prompts(side: str, seed: int, steps: int) -> Sequence[str]:
    """Return the prompts that a side's answers are asked of; none where too few pass the filter."""
    if side == RANDOM:
        return list(dict.fromkeys(questions(COUNT, 20_000 + seed, "".join(KINDS))))
    writer = speaking(host(LARGE, seed % HOSTS, 2 * steps))
    draw = transfer.make_prompt_source(writer, TASK, max_new_tokens=SIZE + 2)
    judge = transfer.make_prompt_filter(source(seed, steps), TASK, adapters="discriminator")
    try:
        accept = judge if side == FILTERED else every
        return transfer.synthesise_prompts(draw, accept, COUNT, rows=ROWS, tries=5 * COUNT, seed=seed).prompts
    except lorac.AdapterError:
        return ()


def right(texts: Sequence[str]) -> float:
    """Return the share of prompts that are of the task."""
    return statistics.fmean([set(text) <= set(OWN) and len(text) == SIZE for text in texts] or [0])


def wrong(compiled: Any, adapters: str) -> float:
    """Return the share of new questions of the task that a model answers wrongly."""
    held = questions(HELD, 1)
    said = transfer.answer_prompts(compiled, held, adapters=adapters, max_new_tokens=2)
    return statistics.fmean(found != question[-1].upper() for question, found in said)


def train(side: str, rate: float, seed: int, steps: int) -> Losses:
    """Carry the adapter over by a side's prompts; return the share that the new one gets wrong."""
    found = prompts(FILTERED if side == SOFT else side, seed, steps)
    if not found:
        return [1.0]
    torch.manual_seed(seed)
    target = speaking(host(LARGE, seed % HOSTS, 2 * steps), target=LORA)
    settings = transfer.TransferSettings(
        count=len(found),
        max_new_tokens=2,
        epochs=max(3 * steps * ROWS // COUNT, 1),
        lr=rate,
        rows=ROWS,
        soft=side == SOFT,
    )
    transfer.transfer(source(seed, steps), target, TASK, settings=settings, draw=lambda *_: found, accept=every)
    return [wrong(target, "target")]


def find(given: argparse.Namespace) -> Finding:
    """Return what each side gets wrong, and how many of its prompts are of the task."""
    sides = {name: functools.partial(train, name) for name in (FILTERED, SOFT, UNFILTERED, RANDOM)}
    few = fewer(given, max(given.seeds // 2, 1))
    (chosen,) = answer([Question(WRONG, sides, RATES, last, "share of the questions")], few)
    seeds, steps = deciding(given), given.steps
    found = {name: [side(chosen.rates[name], seed, steps)[-1] for seed in seeds] for name, side in sides.items()}
    found[SOURCE] = [wrong(source(seed, steps), "source") for seed in seeds]
    found[NEAR] = [one + 0.05 for one in found[SOURCE]]
    taken = {name: [right(prompts(name, seed, steps)) for seed in seeds] for name in sides if name != SOFT}
    adapters = speaking(host(LARGE, 0, 2 * steps), target=LORA).adapters
    count = [sum(tensor.numel() for tensor in adapters["target"].parameters())]
    return Finding(
        [
            Table(WRONG, chosen.what, found, {**chosen.rates, SOURCE: RATE, NEAR: RATE}),
            Table("of the task", "share of the prompts", taken),
            Table("values trained", "by all alike", {name: count for name in sides}),
        ],
        EXPECTED,
    )


EXPECTED = [
    Expected(WRONG, FILTERED, UNFILTERED, "table 6"),
    Expected(WRONG, UNFILTERED, RANDOM, "table 6"),
    Expected(WRONG, FILTERED, NEAR),
    Expected(WRONG, SOFT, NEAR),
]
EXPERIMENT = Experiment(
    claim="An adapter goes over to a larger model by four seeds and filtered prompts as good as it was, better than by "
    "unfiltered ones, and these do better than random ones.",
    source="Wang et al., Trans-LoRA, arXiv 2405.17258, table 6",
    find=find,
    steps=160,
    seeds=4,
    first=100,
    fails_by="prompts that the filter makes no better, or a student that no prompts teach",
)

if __name__ == "__main__":
    main(EXPERIMENT, "trans_lora", __doc__)
