"""From one base to another: prompts are written and filtered, the source answers, the target learns the answers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorac.errors import Unavailable
from lorac.training.initialisation.activations import batches_error
from lorac.training.transfer.generation import (
    PromptAnswer,
    compare_answers,
    continue_prompts,
    fit,
    make_training_batches,
    require_tokenizer,
)
from lorac.training.transfer.task import Task
from lorac.variants.adapter import Adapter

Draw = Callable[[int, int], Sequence[str]]
"""(how many, seed) -> prompts."""
Accept = Callable[[Sequence[str]], Sequence[bool]]
"""Prompts -> whether each is of the task."""


@dataclass(frozen=True)
class SyntheticPrompts:
    """Generated prompts that passed the filter.

    Attributes:
        prompts: as many as requested.
        tried: how many were generated for them.
    """

    prompts: tuple[str, ...]
    tried: int


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """How many prompts are generated, and how the student is trained.

    Attributes:
        count: number of prompts to train on, as many as the task's own data.
        tries: maximum number of generated prompts; None: 20 for each of ``count``.
        max_new_tokens: of a prompt, and of an answer.
        epochs, lr, rows: of the training.
        soft: learn the source's probabilities of its answers' tokens instead of the tokens, where both models have
            one vocabulary.
        seed: of sampling.
    """

    count: int = 250
    tries: int | None = None
    max_new_tokens: int = 48
    epochs: int = 20
    lr: float = 2e-4
    rows: int = 8
    soft: bool = False
    seed: int = 0


_SETTINGS = TransferSettings()
_SOURCE, _DISCRIMINATOR, _TARGET = "source", "discriminator", "target"
"""Names of adapters: the source's own and its discriminator, and the one of the target that learns."""


@dataclass(frozen=True)
class TransferResult:
    """An adapter of another base, with its training data.

    Attributes:
        adapter: the target's.
        pairs: prompts with the source's answers.
        tried: how many prompts were generated.
    """

    adapter: Adapter
    pairs: tuple[PromptAnswer, ...]
    tried: int


def make_prompt_source(compiled: Any, task: Task, *, max_new_tokens: int = 48, **options: Any) -> Draw:
    """Return a function that samples prompts like the task's seeds from a model's base.

    Args:
        compiled: the target, as in the paper, or any other model that generates.
        task: has the seeds.
        max_new_tokens: of a prompt.
        **options: further options of ``generate``: temperature, top_p, …
    """
    options = {"do_sample": True, "max_new_tokens": max_new_tokens, **options}

    def draw(count: int, seed: int) -> list[str]:
        found = continue_prompts(compiled, [task.asking()] * count, seed=seed, rows=count, **options)
        return [task.written(text) for text in found]

    return draw


def make_prompt_filter(compiled: Any, task: Task, *, adapters: str) -> Accept:
    """Return a filter that accepts a prompt if the discriminator finds yes likelier than no."""

    def accept(prompts: Sequence[str]) -> list[bool]:
        questions = [task.about(prompt) for prompt in prompts]
        return compare_answers(compiled, questions, task.yes, task.no, adapters=adapters)

    return accept


def train_discriminator(
    compiled: Any,
    task: Task,
    real: Iterable[str],
    written: Iterable[str],
    *,
    epochs: int = 10,
    lr: float = 2e-4,
    rows: int = 8,
) -> None:
    """Train an adapter to tell prompts of the task from generated ones, while data of the task are available.

    Args:
        compiled: of target eager, with a fresh adapter ``discriminator``.
        task: has the question.
        real: prompts of the task.
        written: generated prompts (``make_prompt_source``).
        epochs, lr, rows: of the training.
    """
    pairs = [(task.about(prompt), task.yes) for prompt in real] + [(task.about(prompt), task.no) for prompt in written]
    fit(
        compiled,
        make_training_batches(require_tokenizer(compiled), pairs, rows=rows, epochs=epochs),
        adapters=_DISCRIMINATOR,
        lr=lr,
    )


def synthesise_prompts(
    draw: Draw,
    accept: Accept,
    count: int,
    *,
    rows: int = 8,
    tries: int | None = None,
    dedupe: bool = True,
    seed: int = 0,
) -> SyntheticPrompts:
    """Generate prompts until enough of them pass the filter.

    Args:
        draw: generates prompts (``make_prompt_source``).
        accept: filters them (``make_prompt_filter``).
        count: how many are needed; in the paper, the number of the task's own data.
        rows: how many are generated at a time.
        tries: maximum number of generated prompts; default: 20 for each of ``count``.
        dedupe: take each prompt once.
        seed: of sampling.

    Raises:
        AdapterError: too few prompts pass within ``tries``.
    """
    tries = 20 * count if tries is None else tries
    found: list[str] = []
    tried = 0
    while len(found) < count and tried < tries:
        prompts = draw(min(rows, tries - tried), seed + tried)
        tried += len(prompts) or rows
        filled = [prompt for prompt in prompts if prompt]
        passed = [prompt for prompt, yes in zip(filled, accept(filled) if filled else (), strict=True) if yes]
        found += [prompt for prompt in dict.fromkeys(passed) if prompt not in found] if dedupe else passed
    if len(found) < count:
        raise batches_error(
            f"{len(found)} of {tried} generated prompts belong to the task, and {count} are needed",
            next_step="raise tries=, give the task more seeds, or train the discriminator longer",
        )
    return SyntheticPrompts(tuple(found[:count]), tried)


def answer_prompts(
    compiled: Any, prompts: Sequence[str], *, adapters: str, max_new_tokens: int = 48
) -> list[PromptAnswer]:
    """Return each prompt with the source's greedy answer."""
    answers = continue_prompts(compiled, prompts, adapters=adapters, max_new_tokens=max_new_tokens, do_sample=False)
    return list(zip(prompts, answers, strict=True))


def transfer(
    source: Any,
    target: Any,
    task: Task,
    *,
    settings: TransferSettings = _SETTINGS,
    draw: Draw | None = None,
    accept: Accept | None = None,
) -> TransferResult:
    """Train an adapter of a new base on the answers of an adapter of another base.

    Args:
        source: compiled, with the adapter to transfer, ``source``, and its ``discriminator``; not changed.
        target: compiled for target eager, with a fresh adapter ``target`` of any method, which is trained.
        task: seeds and questions.
        settings: of generation and training.
        draw: generates prompts; default: the target's base.
        accept: filters them; default: the discriminator.

    Raises:
        Unavailable: a model has no tokenizer, or with ``soft`` the two have different ones.
        AdapterNotFound: one of these adapters is missing.
        AdapterError: as ``synthesise_prompts``; or the source answers no prompt.
    """
    if settings.soft and require_tokenizer(source).get_vocab() != require_tokenizer(target).get_vocab():
        raise Unavailable(
            "the target has another vocabulary than the source, and cannot learn its probabilities",
            next_step="leave out soft=True, and the target learns the source's answers as text",
        )

    @torch.no_grad()
    def teach(batch: dict[str, Tensor]) -> Tensor:
        logits = source(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], adapters=_SOURCE).logits
        return torch.as_tensor(logits)

    draw = draw or make_prompt_source(target, task, max_new_tokens=settings.max_new_tokens)
    accept = accept or make_prompt_filter(source, task, adapters=_DISCRIMINATOR)
    found = synthesise_prompts(
        draw, accept, settings.count, rows=settings.rows, tries=settings.tries, seed=settings.seed
    )
    answers = answer_prompts(source, found.prompts, adapters=_SOURCE, max_new_tokens=settings.max_new_tokens)
    pairs = [pair for pair in answers if pair[1]]
    batches = make_training_batches(
        require_tokenizer(target), pairs, rows=settings.rows, epochs=settings.epochs, seed=settings.seed
    )
    fit(target, batches, adapters=_TARGET, lr=settings.lr, teacher=teach if settings.soft else None)
    return TransferResult(target.adapters[_TARGET], tuple(pairs), found.tried)
