"""Recipes: a dataclass of settings, and its YAML file, which may come from anyone."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from lorac.argument_types import Count, OneOf, check_fields, format_type, matches_type
from lorac.errors import ChoiceError, MissingExtra, OptionError, WrongType, nearest_name, short
from lorac.storage.paths import parse_path
from lorac.storage.strict_yaml import read_yaml

NamedSpec = str | Mapping[str, Any]
"""A name, or ``{"name": ..., <keyword>: ...}``."""
TASKS: Mapping[str, tuple[str, str, str]] = {
    "sft": ("trl", "SFTTrainer", "SFTConfig"),
    "dpo": ("trl", "DPOTrainer", "DPOConfig"),
    "kto": ("trl", "KTOTrainer", "KTOConfig"),
    "sequence-classification": ("transformers", "Trainer", "TrainingArguments"),
    "image-classification": ("transformers", "Trainer", "TrainingArguments"),
}
"""Task -> the library, its trainer, and the dataclass of the trainer's arguments."""
_LEAST: Mapping[str, float] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **{"max_steps": 1, "max_length": 1, "learning_rate": 0},
}
"""Lower limits of arguments that TRL and transformers do not check before the first step."""
_ELSEWHERE = {"output_dir", "resume_from_checkpoint", "model_init_kwargs"}
"""Arguments that ``out``, ``model`` and ``--resume`` stand for."""
_EXAMPLE = "docs/training.md shows a recipe for each task"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run.

    Attributes:
        adapters: name -> ``{"method": <a name of `lorac variants`>, <hyper-parameter>: ...}`` with, if wanted,
            ``"start"``, the name of one of ``lorac.training.initialisation`` or ``{"name": ..., <setting>: ...}``; or
            ``{"path": <an adapter's file>}``, trained on.
        active: name -> strength, as ``swap`` takes it; default: all, at strength 1.
        task: what is learnt, a key of ``TASKS``.
        data: a file or folder (``lorac.trainer.data.load_rows``), or what comes with Python: ``python-docs``,
            ``python-source``.
        eval_data: as ``data``, to evaluate on.
        test_size: the number, or the part, of ``data``'s rows to evaluate on.
        optimizer: one of torch.optim's, or of ``lorac.training``'s, with its keywords; default: the one that the
            argument ``optim`` names.
        rules: those of ``lorac.training`` to attach to it, each with its keywords.
        loss: what is added to the model's loss, one of ``lorac.training``'s functions each, with its keywords.
        start_batches: how many batches a start sees.
        early_stopping_patience: evaluations without a better one after which the run stops.
        arguments: of ``trl.SFTConfig``, ``DPOConfig`` or ``KTOConfig``, or of ``transformers.TrainingArguments``,
            by their own names. In YAML they are top-level fields.

    Raises:
        WrongType, ChoiceError, OptionError: a field is unknown, of another kind, or out of its range.
        MissingExtra: TRL or transformers is not installed.
    """

    adapters: Mapping[str, Mapping[str, Any]]
    active: Mapping[str, float] | None = None
    task: Annotated[str, OneOf(TASKS)] = "sft"
    data: str = "python-docs"
    eval_data: str | None = None
    test_size: int | float | None = None
    optimizer: NamedSpec | None = None
    rules: Sequence[NamedSpec] = ()
    loss: Sequence[NamedSpec] = ()
    start_batches: Count = 8
    early_stopping_patience: Count | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.adapters:
            raise ChoiceError("a recipe without adapters trains nothing", next_step="name one under adapters")
        if self.eval_data is not None and self.test_size is not None:
            raise ChoiceError("eval_data and test_size both say what to evaluate on", next_step="give one of them")
        if self.early_stopping_patience is not None and not self.evaluates:
            raise ChoiceError("early_stopping_patience needs evaluations", next_step="add test_size, or eval_data")
        for name, value in self.arguments.items():
            self._check_argument(name, value)

    @property
    def evaluates(self) -> bool:
        """Return whether there are rows to evaluate on."""
        return self.eval_data is not None or self.test_size is not None

    def load_classes(self) -> tuple[Any, Any]:
        """Return the trainer of the task, and the dataclass of its arguments."""
        library, *names = TASKS[self.task]
        try:
            trainer, config = (getattr(importlib.import_module(library), name) for name in names)
        except ImportError as error:
            raise MissingExtra(library, "train") from error
        return trainer, config

    def _check_argument(self, name: str, value: object) -> None:
        config = self.load_classes()[1]
        hints = _argument_types(config)
        if name not in hints:
            longer = (known for known in hints if known.endswith(f"_{name}"))
            nearest = next(longer, nearest_name(name, [*_OWN, *hints, "model", "out"], alike=0.6))
            what = f"a recipe of the task {self.task} has no field {short(name)}"
            raise OptionError(what, nearest=nearest, next_step=_EXAMPLE)
        what = f"{config.__name__} takes no {name}={short(value)}"
        if not matches_type(value, hints[name]):
            raise WrongType(what, next_step=f"it takes {format_type(hints[name])}")
        if isinstance(value, int | float) and value < _LEAST.get(name, value):
            raise ChoiceError(what, next_step=f"it takes numbers from {_LEAST[name]:g}")


_OWN = frozenset(one.name for one in dataclasses.fields(Recipe)) - {"arguments"}


@functools.cache
def _argument_types(config: type) -> Mapping[str, object]:
    hints = typing.get_type_hints(config)
    return {one.name: hints[one.name] for one in dataclasses.fields(config) if one.name not in _ELSEWHERE}


def read_recipe(path: str | os.PathLike[str]) -> tuple[Recipe, dict[str, str]]:
    """Read a recipe from a YAML file; return it with the file's ``model`` and ``out``.

    Raises:
        MissingExtra: PyYAML, which comes with transformers, is not installed.
        OptionError: the file cannot be read, is not a mapping, has a key twice or an alias, or is too large or deep.
        FormatError: reading it takes too long.
        WrongType, ChoiceError, OptionError: as ``Recipe``.
    """
    file = parse_path(path, "the recipe", OptionError)
    given = read_yaml(file, next_step=_EXAMPLE)
    places: dict[str, str] = {key: given.pop(key) for key in ("model", "out") if key in given}
    for key, value in places.items():
        if not isinstance(value, str):
            raise WrongType(f"'{file}': {key} is {short(value)}", next_step="give the path of a folder")
    if "adapters" not in given:
        raise OptionError(f"'{file}' names no adapters", next_step="add adapters: {mine: {method: lora}}")
    arguments = {key: given.pop(key) for key in [*given] if key not in _OWN}
    return Recipe(**given, arguments=arguments), places
