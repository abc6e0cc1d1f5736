"""From one base to another: prompts are written and filtered, the source answers, the target learns the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lorac.errors import AdapterError
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
    """Prompts that were written and let through.

    Attributes:
        prompts: as many as were asked for.
        tried: how many were written for them.
    """

    prompts: tuple[str, ...]
    tried: int


@dataclass(frozen=True, kw_only=True)
class TransferRoles:
    """Names of adapters: the source's own and its discriminator, and the one of the target that learns."""

    teacher: str = "source"
    discriminator: str = "discriminator"
    student: str = "target"


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """How much is written, and how it is learnt.

    Attributes:
        count: how many prompts are learnt from: as many as the task's own data were.
        tries: after how many that are written it is given up; None for 20 for each that is wanted.
        max_new_tokens: of a prompt, and of an answer.
        epochs, lr, rows: of the training.
        seed: what is drawn from.
    """

    count: int = 250
    tries: int | None = None
    max_new_tokens: int = 48
    epochs: int = 20
    lr: float = 2e-4
    rows: int = 8
    seed: int = 0


_ROLES, _SETTINGS = TransferRoles(), TransferSettings()


@dataclass(frozen=True)
class TransferResult:
    """An adapter of another base, and what it learnt from.

    Attributes:
        adapter: of the target.
        pairs: prompts with the source's answers.
        tried: how many prompts were written for them.
    """

    adapter: Adapter
    pairs: tuple[PromptAnswer, ...]
    tried: int


def make_prompt_source(
    compiled: Any, task: Task, *, adapters: Any = None, max_new_tokens: int = 48, **told: Any
) -> Draw:
    """Prompts as a model writes them that sees the task's seeds; it samples, and its own answers are dropped.

    Args:
        compiled: the target, which is the paper's choice, or any other that generates.
        task: gives the seeds.
        adapters: what it writes with; None for the base.
        max_new_tokens: of a prompt.
        **told: as ``generate`` takes it: temperature, top_p, …
    """
    told = {"do_sample": True, "max_new_tokens": max_new_tokens, **told}

    def draw(count: int, seed: int) -> list[str]:
        found = continue_prompts(compiled, [task.asking()] * count, adapters=adapters, seed=seed, rows=count, **told)
        return [task.written(text) for text in found]

    return draw


def make_prompt_filter(compiled: Any, task: Task, *, adapters: str) -> Accept:
    """The filter: a prompt is the task's where the discriminator finds yes likelier than no."""

    def accept(prompts: Sequence[str]) -> list[bool]:
        asked = [task.about(prompt) for prompt in prompts]
        return compare_answers(compiled, asked, task.yes, task.no, adapters=adapters)

    return accept


def train_discriminator(
    compiled: Any,
    task: Task,
    real: Iterable[str],
    written: Iterable[str],
    *,
    adapters: str = "discriminator",
    epochs: int = 10,
    lr: float = 2e-4,
    rows: int = 8,
) -> None:
    """Teach an adapter to tell prompts of the task from those that a model wrote, while there are data of the task.

    Args:
        compiled: of target eager, with the adapter.
        task: how it is asked.
        real: prompts of the task.
        written: prompts that a model wrote (``drawn_by``).
        adapters: the adapter's name.
        epochs, lr, rows: of the training.
    """
    pairs = [(task.about(prompt), task.yes) for prompt in real] + [(task.about(prompt), task.no) for prompt in written]
    fit(
        compiled,
        make_training_batches(require_tokenizer(compiled), pairs, rows=rows, epochs=epochs),
        adapters=adapters,
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
    """So many prompts that are accepted.

    Args:
        draw: writes prompts (``drawn_by``).
        accept: filters them (``accepted_by``).
        count: how many are wanted: the paper's is the number of the task's own data.
        rows: how many are written at a time.
        tries: after how many it is given up; default: 20 for each that is wanted.
        dedupe: take each prompt once.
        seed: what is drawn from.

    Raises:
        AdapterError: so many tries do not give so many prompts.
    """
    tries = 20 * count if tries is None else tries
    found: list[str] = []
    tried = 0
    while len(found) < count and tried < tries:
        prompts = [prompt for prompt in draw(min(rows, tries - tried), seed + tried)]
        tried += len(prompts) or rows
        asked = [prompt for prompt in prompts if prompt]
        passed = [prompt for prompt, yes in zip(asked, accept(asked) if asked else (), strict=True) if yes]
        found += _select_new(passed, found) if dedupe else passed
    if len(found) < count:
        raise AdapterError(
            f"of {tried} prompts that were written {len(found)} are of the task, and {count} are wanted",
            next_step="raise tries=, give the task more seeds, or train the discriminator longer",
            code="batches_needed",
        )
    return SyntheticPrompts(tuple(found[:count]), tried)


def _select_new(prompts: Sequence[str], known: Sequence[str]) -> list[str]:
    return [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]


def answer_prompts(
    compiled: Any, prompts: Sequence[str], *, adapters: str, max_new_tokens: int = 48
) -> list[PromptAnswer]:
    """Each prompt with what the source says to it, greedily and word for word."""
    said = continue_prompts(compiled, prompts, adapters=adapters, max_new_tokens=max_new_tokens, do_sample=False)
    return list(zip(prompts, said, strict=True))


def transfer(
    source: Any,
    target: Any,
    task: Task,
    *,
    roles: TransferRoles = _ROLES,
    settings: TransferSettings = _SETTINGS,
    draw: Draw | None = None,
    accept: Accept | None = None,
) -> TransferResult:
    """An adapter of one base, and maybe of another method, that does what an adapter of another base does.

    Args:
        source: compiled, with the adapter to transfer and its discriminator; only asked.
        target: compiled for target eager, with a fresh adapter of any method, which is trained.
        task: what is known of the data.
        roles: the adapters' names.
        settings: how much is written and how it is learnt.
        draw: who writes prompts; default: the target's base.
        accept: who filters them; default: the discriminator.

    Raises:
        Unavailable: a model has no tokenizer.
        AdapterNotFound: an adapter of such a name is missing.
        AdapterError: as ``synthesise``; or the source has nothing to say to any prompt.
    """
    told = settings
    draw = draw or make_prompt_source(target, task, max_new_tokens=told.max_new_tokens)
    accept = accept or make_prompt_filter(source, task, adapters=roles.discriminator)
    found = synthesise_prompts(draw, accept, told.count, rows=told.rows, tries=told.tries, seed=told.seed)
    said = answer_prompts(source, found.prompts, adapters=roles.teacher, max_new_tokens=told.max_new_tokens)
    pairs = [pair for pair in said if pair[1]]
    batches = make_training_batches(
        require_tokenizer(target), pairs, rows=told.rows, epochs=told.epochs, seed=told.seed
    )
    fit(target, batches, adapters=roles.student, lr=told.lr)
    return TransferResult(target.adapters[roles.student], tuple(pairs), found.tried)
