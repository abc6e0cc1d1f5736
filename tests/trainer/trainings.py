"""Trainings by ``AdapterTrainer`` on a few rows, whole, stopped and continued."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

import lorac
from lorac.trainer import Recipe
from lorac.trainer.factories import make_losses
from lorac.trainer.losses import extra_outputs
from lorac.trainer.trainer import adapter_trainer
from tests.training.loops import data, host

STEPS = 4
ROWS = [{key: value[i] for key, value in batch.items()} for batch in data("tiny_llama", STEPS) for i in range(2)]


def plan(**fields: Any) -> Recipe:
    """A recipe for a trainer of transformers'; what it says of adapters is compared alone."""
    given = {"adapters": {"a": {"method": "lora"}}, "task": "sequence-classification", **fields}
    return Recipe(**given)


class Stop(TrainerCallback):
    """Ends a training after a step, as if its process had died."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def compiled_of(adapters: Mapping[str, Any], recipe: Recipe, *, name: str = "tiny_llama") -> Any:
    """Compile adapters, all of them active, as a run of a recipe does."""
    options: dict[str, Any] = {"aux": list(extra_outputs(make_losses(recipe.loss)))}
    return lorac.compile(host(name), adapters, active=dict.fromkeys(adapters, 1.0), **options)


def trainer_of(
    compiled: Any, recipe: Recipe, folder: Path, *, base: Any = Trainer, rows: Any = ROWS, **settings: Any
) -> Any:
    """A trainer over a compiled model, with a checkpoint after every step."""
    data = {name: settings.pop(name) for name in ("callbacks", "eval_dataset") if name in settings}
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **recipe.arguments,
        **settings,
    }
    arguments = TrainingArguments(output_dir=str(folder), **given)
    return adapter_trainer(base)(model=compiled, args=arguments, train_dataset=rows, recipe=recipe, **data)


def tensors_of(compiled: Any) -> dict[str, Tensor]:
    """Every tensor that the model saves, copied."""
    return {
        name: tensor.detach().clone()
        for name, tensor in compiled.state_dict().items()
        if not name.endswith("_extra_state")
    }


def same(one: Any, other: Any) -> bool:
    """Whether two models have the same adapters' tensors, to the bit."""
    here, there = tensors_of(one), tensors_of(other)
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
