"""The training loop: optimizer steps over batches, on one process or several, logged and saved in checkpoints."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import lorac
from lorac.errors import ChoiceError, MissingExtra
from lorac.progress import progress
from lorac.trainer import checkpoints
from lorac.trainer import factories as named
from lorac.trainer import text_rows as texts
from lorac.trainer.checkpoints import Checkpoint
from lorac.trainer.data import TrainingData
from lorac.trainer.recipe import Recipe

if TYPE_CHECKING:
    from lorac.session.compiled import Compiled

LOG = "log.jsonl"


def train(model: nn.Module, tokenizer: Any, recipe: Recipe, out: str | Path, *, resume: bool = False) -> Compiled:
    """Train the adapters of a recipe, and save each in ``out``: in PEFT's format, or where it has no place in lorac's.

    Besides, ``out`` gets ``log.jsonl`` (step, loss, rate, tokens per second; losses of held-out rows) and the
    checkpoints. Under ``torchrun`` or ``accelerate launch`` it trains on several processes,
    each with ``batch_size`` rows a call.

    Args:
        model: the base, left unchanged.
        tokenizer: transformers', of the model.
        recipe: what to train, and how.
        out: a folder without a run in it, but for ``resume``.
        resume: go on at the newest checkpoint in ``out``; the result is, to the bit, that of not having stopped.

    Returns:
        The model compiled for eager with the trained adapters, in eval mode.

    Raises:
        MissingExtra: accelerate or transformers is not installed.
        ChoiceError: ``out`` holds a run already, or none to resume.
        LoracError: what the recipe's names, files and data raise.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import set_seed
    except ModuleNotFoundError as error:
        raise MissingExtra("accelerate", "hf") from error
    folder = Path(out)
    checkpoint = _find_checkpoint(folder, resume)
    data = TrainingData(recipe, tokenizer)
    accelerator = Accelerator(
        gradient_accumulation_steps=recipe.gradient_accumulation_steps, mixed_precision=recipe.mixed_precision
    )
    set_seed(recipe.seed)
    with progress("train", recipe.max_steps) as report:
        report.step("compiling")
        given = named.make_adapters(recipe.adapters if checkpoint is None else checkpoint.adapters(), model, data.first)
        active = dict.fromkeys(given, 1.0) if recipe.active is None else dict(recipe.active)
        compiled: Any = lorac.compile(model, given, active=active)
        for line in _TrainingRun(compiled, recipe, accelerator, data, folder).steps(checkpoint):
            report.step(line)
    if accelerator.is_main_process:
        for name, adapter in compiled.adapters.items():
            checkpoints.save_trained_adapter(adapter, folder / name, model)
    accelerator.wait_for_everyone()
    trained: Compiled = compiled.eval()
    return trained


def _find_checkpoint(folder: Path, resume: bool) -> Checkpoint | None:
    """Where to go on; None where a run begins."""
    found = checkpoints.find_newest_checkpoint(folder)
    if resume and found is None:
        raise ChoiceError(f"'{folder}' holds no checkpoint", next_step="train without resume; save_steps= writes them")
    if not resume and (found is not None or (folder / LOG).exists()):
        raise ChoiceError(f"'{folder}' holds a run already", next_step="resume it, or give another folder")
    return found


@dataclass
class _TrainingRun:
    """One training.

    Attributes:
        compiled: what trains.
        recipe: how.
        accelerator: on how many processes, and in what precision.
        data: on what.
        folder: where the log and the checkpoints go.
    """

    compiled: Any
    recipe: Recipe
    accelerator: Any
    data: TrainingData
    folder: Path

    def steps(self, checkpoint: Checkpoint | None) -> Iterator[str]:
        """Take all steps that are left, and say of each what came of it."""
        from transformers import get_scheduler

        recipe, accelerator = self.recipe, self.accelerator
        optimizer = named.make_optimizer(recipe.optimizer, self.compiled, recipe.learning_rate)
        rule = (
            contextlib.nullcontext() if recipe.rule is None else named.make_rule(recipe.rule, self.compiled, optimizer)
        )
        scheduler = get_scheduler(recipe.lr_scheduler_type, optimizer, recipe.warmup_steps, recipe.max_steps)
        done = 0 if checkpoint is None else checkpoint.restore(optimizer, scheduler, accelerator.process_index)
        calls = recipe.gradient_accumulation_steps * accelerator.num_processes
        loader = self.data.loader(done * calls, recipe.max_steps * calls)
        model, held, batches = accelerator.prepare(self.compiled, optimizer, loader)
        log = _TrainingLog(self.folder / LOG, accelerator)
        with rule:
            if checkpoint is None:
                log.write(step=0, held_out_loss=self.held_out_loss())
            for _ in self.taken(model, held, batches, log):
                done += 1
                yield log.step(done, scheduler.get_last_lr()[0], every=recipe.logging_steps)
                scheduler.step()
                self._keep(done, optimizer, scheduler)
            log.write(step=done, held_out_loss=self.held_out_loss())

    def taken(self, model: nn.Module, optimizer: Any, batches: Iterable[Any], log: _TrainingLog) -> Iterator[None]:
        """Every step, once it is taken."""
        for batch in batches:
            log.call(self.call(model, optimizer, batch), batch)
            if self.accelerator.sync_gradients:
                yield

    def call(self, model: nn.Module, optimizer: Any, batch: Any) -> torch.Tensor:
        """One call and its gradients, and a step where its turn is; gives the loss."""
        model.train()
        with self.accelerator.accumulate(model):
            loss: torch.Tensor = model(**batch).loss
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients and self.recipe.max_grad_norm is not None:
                self.accelerator.clip_grad_norm_(model.parameters(), self.recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def held_out_loss(self) -> float | None:
        """Return the mean loss per counted token of the evaluation rows; None without such rows."""
        batches = self.data.held_out()
        if not batches:
            return None
        self.compiled.eval()
        total, counted = 0.0, 0
        for batch in batches:
            given = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            with torch.no_grad():
                loss = self.compiled(**given).loss
            weight = int((batch["labels"][:, 1:] != texts.IGNORED_LABEL).sum())
            total, counted = total + float(loss) * weight, counted + weight
        return total / max(counted, 1)

    def _keep(self, done: int, optimizer: Any, scheduler: Any) -> None:
        """Write a checkpoint, where it is time for one."""
        if self.recipe.save_steps and done % self.recipe.save_steps == 0:
            checkpoints.write_checkpoint(
                self.folder, done, self.compiled.adapters, optimizer, scheduler, self.accelerator
            )


class _TrainingLog:
    """Losses, rate and speed since the last line, over all processes; the first process writes."""

    def __init__(self, path: Path, accelerator: Any) -> None:
        self.path, self.accelerator = path, accelerator
        self._begin()

    def call(self, loss: torch.Tensor, batch: Any) -> None:
        """Count a call."""
        self._losses.append(loss)
        self._tokens += int(batch["attention_mask"].sum())

    def step(self, done: int, rate: float, every: int) -> str:
        """Say how a step went; every so many of them a line is written."""
        loss = float(torch.stack(self._losses).mean())
        speed = self._tokens / (time.perf_counter() - self._begun)
        if done % every == 0:
            sums = self.accelerator.reduce(torch.tensor([loss, speed], dtype=torch.float64), "sum").tolist()
            mean = sums[0] / self.accelerator.num_processes
            self.write(step=done, loss=mean, learning_rate=rate, tokens_per_second=sums[1])
        return f"step {done}, loss {loss:.3f}, {speed:.0f} tokens/s"

    def write(self, **values: Any) -> None:
        """Add a line of what is known; losses and speed are counted anew from here."""
        known = {name: value for name, value in values.items() if value is not None}
        self._begin()
        if len(known) < 2 or not self.accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(known) + "\n")

    def _begin(self) -> None:
        self._losses: list[torch.Tensor] = []
        self._tokens, self._begun = 0, time.perf_counter()
