"""Training with an optimizer that a rule is on: a plain loop, Trainer, and a small host in float64."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.training.loops import Batch


def linear(columns: int, out: int, *, seed: int = 0) -> nn.Module:
    """One bias-free layer of float64 called ``site``."""
    model = nn.Sequential()
    model.add_module("site", nn.Linear(columns, out, bias=False, dtype=torch.float64))
    weight = torch.randn(out, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model.site.weight.data.copy_(weight)
    return model


def drawn(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain(compiled: Any, optimizer: Any, batches: Iterable[Batch]) -> list[float]:
    """One step per batch; the loss of each."""
    compiled.train()
    losses = []
    for batch in batches:
        loss = compiled(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    compiled.eval()
    return losses


def by_trainer(compiled: Any, optimizer: Any, batches: list[Batch], folder: Path) -> list[float]:
    """The same with transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    rows = [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(len(batch["labels"]))]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(batches),
        per_device_train_batch_size=len(batches[0]["labels"]),
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=compiled, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    compiled.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
