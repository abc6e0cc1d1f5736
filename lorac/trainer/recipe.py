"""Recipes: a dataclass of settings, and its YAML file, which may come from anyone."""

import dataclasses
import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

from lorac.argument_types import Count, Fields, OneOf, check_fields, field_types, format_type, matches_type
from lorac.errors import ChoiceError, OptionError, WrongType, nearest_name, short, translate_import_errors
from lorac.storage.paths import parse_path
from lorac.storage.strict_yaml import read_yaml

NamedSpec = str | Fields
"""A name, or ``{"name": ..., <keyword>: ...}``."""
DataSpec = str | Fields
"""A place of rows, or ``{"path": ..., <option>: ...}``."""


class TrainerTask(NamedTuple):
    """A kind of training.

    Attributes:
        library: the module of its trainer.
        trainer: the trainer's class.
        config: the dataclass of the trainer's arguments.
        columns: the sets of columns that its rows may have.
        defaults: the arguments that the task's name stands for.
    """

    library: str
    trainer: str
    config: str
    columns: tuple[tuple[str, ...], ...]
    defaults: Fields = MappingProxyType({})


_ANSWERS, _PAIRS = ("prompt", "completion"), (("chosen", "rejected"),)
_TEXTS = (("text",), ("messages",), _ANSWERS, ("instruction", "output"), ("conversations",))
_CPO = ("trl.experimental.cpo", "CPOTrainer", "CPOConfig", _PAIRS)
_CLASSIFIER = ("transformers", "Trainer", "TrainingArguments")
TASKS: Mapping[str, TrainerTask] = {
    "sft": TrainerTask("trl", "SFTTrainer", "SFTConfig", _TEXTS),
    "vlm": TrainerTask("trl", "SFTTrainer", "SFTConfig", tuple(("images", *columns) for columns in _TEXTS[:3])),
    "dpo": TrainerTask("trl", "DPOTrainer", "DPOConfig", _PAIRS),
    "kto": TrainerTask("trl", "KTOTrainer", "KTOConfig", ((*_ANSWERS, "label"),)),
    "orpo": TrainerTask("trl.experimental.orpo", "ORPOTrainer", "ORPOConfig", _PAIRS),
    "cpo": TrainerTask(*_CPO),
    "simpo": TrainerTask(*_CPO, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    "reward": TrainerTask("trl", "RewardTrainer", "RewardConfig", _PAIRS),
    "grpo": TrainerTask("trl", "GRPOTrainer", "GRPOConfig", (("prompt",),)),
    "rloo": TrainerTask("trl", "RLOOTrainer", "RLOOConfig", (("prompt",),)),
    "seq2seq": TrainerTask("transformers", "Seq2SeqTrainer", "Seq2SeqTrainingArguments", (_ANSWERS,)),
    "sequence-classification": TrainerTask(*_CLASSIFIER, (("text", "label"),)),
    "image-classification": TrainerTask(*_CLASSIFIER, (("image", "label"),)),
}
"""Task -> its trainer and rows."""
OWN_LOSS = ("sft", "vlm", "seq2seq", "sequence-classification", "image-classification")
"""Tasks that train by the model's own loss."""
_LEAST: Mapping[str, float] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **{"max_steps": 1, "max_length": 1, "learning_rate": 0, "save_steps": 1e-3},
}
"""Lower limits of arguments that TRL and transformers do not check before the first step."""
_ELSEWHERE = {
    **{"output_dir": "out", "resume_from_checkpoint": "--resume", "model_init_kwargs": "model", "deepspeed": "fsdp"},
    **{"model_name_or_path": "model", "datasets": "data", "dataset": "data", "val_size": "test_size"},
    **{"rl": "task", "stage": "task", "sequence_len": "max_length", "cutoff_len": "max_length"},
    **{"micro_batch_size": "per_device_train_batch_size", "sample_packing": "packing"},
    **dict.fromkeys(("lora_r", "lora_rank", "lora_alpha", "lora_target", "finetuning_type"), "adapters"),
}
"""Argument that a recipe does not take, or a name of Axolotl's or LLaMA-Factory's -> the field or option instead."""
_OPTIMIZER = ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
"""Arguments of the trainer's own optimizer."""
_EXAMPLE = "docs/training.md shows a recipe for each task"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run.

    Attributes:
        adapters: name -> ``{"method": <one of `lorac variants`>, <hyper-parameter>: ...}``, perhaps with ``"start"``,
            one of ``lorac.training.initialisation``; or ``{"path": <an adapter's file>}``, trained on.
        model, out: for the command line: the model that `lorac train` loads, and the folder that it writes.
        active: name -> strength, as ``swap`` takes it; default: all, at strength 1.
        task: a key of ``TASKS``.
        data: the rows (``lorac.trainer.data.load_rows``): one place or several.
        eval_data: as ``data``, to evaluate on.
        streaming: read rows as they are needed, in the order of their files.
        chat_template: TRL's name of a template, ``"chatml"``, or a file, instead of the tokenizer's own.
        reward_funcs: for grpo and rloo: names of ``trl.rewards``, ``package.module:function``, or models of rewards.
        test_size: the number, or the part, of ``data``'s rows to evaluate on.
        optimizer: one of torch.optim's or of ``lorac.training``'s; default: the one of the argument ``optim``.
        rules: those of ``lorac.training`` to attach to it.
        loss: terms to add to the model's loss, by the names of ``lorac.training``'s functions.
        start_batches: number of batches that a start sees.
        early_stopping_patience: evaluations without a better one after which the run stops.
        merge: a new folder for the base with the adapters merged into it, and its tokenizer.
        push: a repository of the hub for the adapter; with several adapters, ``-<its name>`` is appended for each.
        recover: for LoRAM, where the model is a smaller copy: ``{"model": <folder of the large one>, "pruned": <a
            folder of pruned_idx files, or a file of write_pruning_record>}``. LoRAs are written for the large model.
        arguments: of the task's dataclass in ``TASKS``, by their own names. In YAML they are top-level fields.

    Raises:
        WrongType, ChoiceError, OptionError: a field is unknown, of another kind, or out of its range.
        MissingExtra: TRL or transformers is not installed.
    """

    adapters: Mapping[str, Fields] = field(default_factory=dict)
    model: str | None = None
    out: str | None = None
    active: Mapping[str, float] | None = None
    task: Annotated[str, OneOf(TASKS)] = "sft"
    data: DataSpec | Sequence[DataSpec] = ()
    eval_data: DataSpec | Sequence[DataSpec] | None = None
    streaming: bool | None = None
    chat_template: str | None = None
    reward_funcs: Sequence[str] | None = None
    test_size: int | float | None = None
    optimizer: NamedSpec | None = None
    rules: Sequence[NamedSpec] = ()
    loss: Sequence[NamedSpec] = ()
    start_batches: Count = 8
    early_stopping_patience: Count | None = None
    merge: str | None = None
    push: str | None = None
    recover: Mapping[str, str] | None = None
    arguments: Fields = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.adapters:
            raise ChoiceError(
                "a recipe without adapters trains nothing", next_step="add adapters: {mine: {method: lora}}"
            )
        idle = next((name for name in self.adapters if self.active is not None and not self.active.get(name)), None)
        if idle is not None:
            raise ChoiceError(
                f"active gives the adapter '{idle}' no strength, so that nothing trains it",
                next_step=f"add {idle}: 1.0 to active, or leave '{idle}' out of adapters",
            )
        if self.eval_data is not None and self.test_size is not None:
            raise ChoiceError("eval_data and test_size both name rows to evaluate on", next_step="give one of them")
        if self.streaming and self.test_size is not None:
            raise ChoiceError("test_size splits rows, and streamed ones are not counted", next_step="give eval_data")
        if bool(self.reward_funcs) != (self.task in ("grpo", "rloo")):
            what, step = f"the task {self.task} takes no reward_funcs", "leave them out; grpo and rloo take them"
            if not self.reward_funcs:
                what, step = f"the task {self.task} needs reward_funcs", "add reward_funcs: [package.module:function]"
            raise ChoiceError(what, next_step=step)
        if self.early_stopping_patience is not None and not self.evaluates:
            raise ChoiceError("early_stopping_patience needs evaluations", next_step="add test_size, or eval_data")
        if self.recover is not None and self.recover.keys() != {"model", "pruned"}:
            what = f"recover has the fields {', '.join(self.recover) or 'none'}"
            raise OptionError(what, next_step="give model, the large model, and pruned, the record of its pruning")
        if self.merge is not None and (self.recover is not None or Path(self.merge).exists()):
            what = f"'{self.merge}' exists already" if self.recover is None else "recover's large model has no weights"
            raise ChoiceError(f"nothing can be merged: {what}", next_step="give merge a new folder, or leave it out")
        for name, value in self.arguments.items():
            config = self.load_classes()[1]
            types = field_types(config)
            if name in _ELSEWHERE or name not in types:
                longer = (known for known in types if known.endswith(f"_{name}"))
                nearest = _ELSEWHERE.get(name) or next(longer, nearest_name(name, [*_OWN, *types], alike=0.6))
                what = f"a recipe of the task {self.task} has no field {short(name)}"
                raise OptionError(what, nearest=nearest, next_step=_EXAMPLE)
            what = f"{config.__name__} takes no {name}={short(value)}"
            if not matches_type(value, types[name]) and not (name == "fsdp" and value is True):
                raise WrongType(what, next_step=f"it takes {format_type(types[name])}")
            is_default = value == getattr(config, name, None)
            if isinstance(value, int | float) and value < _LEAST.get(name, value) and not is_default:
                raise ChoiceError(what, next_step=f"it takes numbers from {_LEAST[name]:g}")
            if self.optimizer is not None and name in _OPTIMIZER:
                what = f"{name} is of the trainer's own optimizer, and the recipe names another"
                raise OptionError(what, next_step="give it as a keyword of optimizer:, or leave optimizer: out")

    @property
    def evaluates(self) -> bool:
        """Return whether there are rows to evaluate on."""
        return self.eval_data is not None or self.test_size is not None

    def load_classes(self) -> tuple[Any, Any]:
        """Return the trainer of the task, and the dataclass of its arguments."""
        task = TASKS[self.task]
        with translate_import_errors():
            trainer, config = (getattr(importlib.import_module(task.library), name) for name in task[1:3])
        return trainer, config

    def refuse(self, what: str, **_: object) -> OptionError:
        """Return the error for a library's refusal, with the fields that its message names or quotes."""
        said, given = what.partition(": ")[2].lower(), {"test_size": self.test_size, **self.arguments}
        words = re.sub(r"[_\W]+", "_", f" {said} ")
        known = [*given, *(name for name in field_types(self.load_classes()[1]) if "_" in name and name not in given)]
        found = [name for name in known if f"_{name}_" in words or f"_{'_'.join(name.split('_')[-2:])}_" in words]
        texts = {name: [*value] if isinstance(value, dict) else [value] for name, value in given.items()}
        quoted = [name for name, held in texts.items() if any(f"'{text}".lower() in said for text in held)]
        named = [name for name in found if name in given] or quoted or found
        step = f"change {' or '.join(named[:3])}" if named else "change the rows, or a field that the message names"
        return OptionError(what, next_step=step)


_OWN = frozenset(one.name for one in dataclasses.fields(Recipe)) - {"arguments"}


def read_recipe(path: str | os.PathLike[str], overrides: Fields = MappingProxyType({})) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
        path: the file.
        overrides: field -> value in place of the file's; ``"adapters.mine.r"`` names a field within fields.

    Raises:
        OptionError: the file cannot be read, is not a mapping, has a name twice or an alias, or is too large or deep.
        FormatError: reading it takes too long.
        WrongType, ChoiceError, OptionError: as ``Recipe``.
    """
    given = read_yaml(parse_path(path, "the recipe", OptionError), next_step=_EXAMPLE)
    for key, value in overrides.items():
        *above, last = key.split(".")
        fields: Any = given
        for name in above:
            fields = fields.setdefault(name, {})
            if not isinstance(fields, dict):
                what = f"'{key}' names a field of {name}, which holds {short(fields)}"
                raise OptionError(what, next_step="give all of its value, or the path of a field: adapters.mine.r=8")
        fields[last] = value
    own = {name: given.pop(name) for name in _OWN & given.keys()}
    return Recipe(**own, arguments=given)
