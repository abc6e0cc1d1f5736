"""Recipes: a dataclass of settings, and its YAML file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorac.argument_types import check_fields
from lorac.errors import ChoiceError, MissingExtra, OptionError, nearest_name, not_one_of
from lorac.storage.paths import translate_os_errors

NamedSpec = str | Mapping[str, Any]
"""A name, or ``{"name": ..., <keyword>: ...}``."""
AMOUNTS = ("max_steps", "batch_size", "max_length", "gradient_accumulation_steps", "logging_steps")
PRECISIONS = ("no", "fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run. Names are those of transformers' ``TrainingArguments`` where it has them.

    Attributes:
        adapters: name -> ``{"method": <a name of `lorac variants`>, <hyper-parameter>: ...}`` with, if wanted,
            ``"start"``, the name of one of ``lorac.training.initialisation`` or ``{"name": ..., <setting>: ...}``; or
            ``{"path": <an adapter's file>}``, trained on.
        active: name -> strength, as ``swap`` takes it; default: all, at strength 1.
        data: a folder of texts (``.txt``, ``.md``, ``.jsonl`` with ``text``, ``prompt`` and ``completion``, or
            ``messages``), one such file, or a set that comes with Python: ``python-docs``, ``python-source``.
        optimizer: one of torch.optim's, or of ``lorac.training``'s; its keywords, ``rank`` and what else
            ``galore_groups`` takes among them.
        rule: one of ``lorac.training``'s rules; its keywords.
        learning_rate: of the optimizer.
        lr_scheduler_type: as ``transformers.get_scheduler`` names it.
        warmup_steps: of the scheduler.
        max_steps: of the optimizer.
        batch_size: rows of one process's call.
        gradient_accumulation_steps: calls of one step.
        max_length: tokens of a row.
        max_grad_norm: what gradients are clipped to; None leaves them.
        eval_rows: rows that are held out, at most half; their loss is taken at the beginning and at the end.
        start_batches: how many batches a start sees.
        mixed_precision: accelerate's: ``"no"``, ``"fp16"`` or ``"bf16"``.
        logging_steps: steps between two lines of ``log.jsonl``.
        save_steps: steps between two checkpoints; None writes none.
        seed: of order, dropout and first values.

    Raises:
        WrongType, ChoiceError, OptionError: a field is of another kind, or out of its range.
    """

    adapters: Mapping[str, Mapping[str, Any]]
    active: Mapping[str, float] | None = None
    data: str = "python-docs"
    optimizer: NamedSpec = "AdamW"
    rule: NamedSpec | None = None
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    max_steps: int = 100
    batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_length: int = 128
    max_grad_norm: float | None = 1.0
    eval_rows: int = 0
    start_batches: int = 8
    mixed_precision: str = "no"
    logging_steps: int = 10
    save_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.adapters:
            raise ChoiceError("a recipe without adapters trains nothing", next_step="name one under adapters")
        least = {**dict.fromkeys(AMOUNTS, 1), "warmup_steps": 0, "eval_rows": 0, "start_batches": 1, "save_steps": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ChoiceError(f"{name}={value}", next_step=f"give {smallest} or more")
        if self.mixed_precision not in PRECISIONS:
            raise not_one_of("there is no mixed_precision", self.mixed_precision, PRECISIONS)


def read_recipe(path: str | os.PathLike[str]) -> tuple[Recipe, dict[str, str]]:
    """Read a recipe from a YAML file; return it with the file's ``model`` and ``out``.

    Raises:
        MissingExtra: PyYAML, which comes with transformers, is not installed.
        OptionError: the file cannot be read, is no mapping, or has a key that is no field of a recipe.
        WrongType, ChoiceError: as ``Recipe``.
    """
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise MissingExtra("pyyaml", "hf") from error
    with translate_os_errors(path, OptionError, "read"):
        text = Path(path).read_bytes()
    try:
        given = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"'{path}' is no YAML: {error}", next_step="docs/training.md shows a recipe") from error
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise OptionError(f"'{path}' holds no keys and values", next_step="docs/training.md shows a recipe")
    places = {key: str(given.pop(key)) for key in ("model", "out") if key in given}
    known = [field.name for field in dataclasses.fields(Recipe)]
    for key in given:
        if key not in known:
            nearest = nearest_name(key, [*known, "model", "out"])
            raise OptionError(f"'{path}': there is no {key}", nearest=nearest, next_step="docs/training.md lists all")
    if "adapters" not in given:
        raise OptionError(f"'{path}' names no adapters", next_step="add adapters: {mine: {method: lora}}")
    return Recipe(**given), places
