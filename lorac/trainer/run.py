"""One run of a recipe: rows, a compiled model and the task's trainer, put together."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

import lorac
from lorac.errors import ChoiceError, LoracError, MissingExtra, OptionError
from lorac.storage.paths import parse_path
from lorac.trainer import checkpoints, factories
from lorac.trainer.data import load_rows
from lorac.trainer.recipe import Recipe

if TYPE_CHECKING:
    from lorac.session.compiled import CompiledModule


def train(
    model: nn.Module, processing_class: Any, recipe: Recipe, out: str | Path, *, resume: bool = False
) -> CompiledModule:
    """Train the adapters of a recipe, and save each in ``out``: in PEFT's format, or where it has no place in lorac's.

    Besides, ``out`` gets the trainer's checkpoints, and ``trainer_state.json`` with everything it logged. Under
    ``torchrun`` or ``accelerate launch`` it trains on several processes.

    Args:
        model: the base, left unchanged.
        processing_class: the model's tokenizer; of images the processor. Left unchanged.
        recipe: what to train, and how.
        out: a folder without a run in it, but for ``resume``.
        resume: go on at the newest checkpoint in ``out``; the result is, to the bit, that of not having stopped.

    Returns:
        The model compiled for eager with the trained adapters, in eval mode.

    Raises:
        MissingExtra: TRL, ``datasets`` or transformers is not installed.
        ChoiceError: ``out`` holds a run already, or none to resume.
        OptionError: the trainer, or its dataclass of arguments, refuses the recipe.
        LoracError: what the recipe's names, files and data raise.
    """
    try:
        from transformers import set_seed
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "train") from error
    folder = parse_path(out, "out", OptionError)
    found = _find_checkpoint(folder, resume)
    with _unchanged(model):
        run = _Run(model, copy.deepcopy(processing_class), recipe, folder)
        set_seed(run.arguments.seed)
        adapters = (
            factories.make_adapters(recipe.adapters, model, run.batches) if found is None else found.adapters(model)
        )
        trainer = run.make_trainer(adapters)
        trainer.train(resume_from_checkpoint=None if found is None else str(found.folder))
        trainer.save_state()
        compiled: CompiledModule = trainer.model
        if trainer.is_world_process_zero():
            checkpoints.save_trained_adapters(compiled.adapters, folder, model)
        trainer.accelerator.wait_for_everyone()
    return compiled.eval()


def _find_checkpoint(folder: Path, resume: bool) -> checkpoints.Checkpoint | None:
    """Where to go on; None where a run begins."""
    found = checkpoints.find_checkpoint(folder)
    if resume and found is None:
        raise ChoiceError(
            f"'{folder}' holds no checkpoint", next_step="train without resume; save_steps says how often"
        )
    if not resume and (found is not None or (folder / "trainer_state.json").exists()):
        raise ChoiceError(f"'{folder}' holds a run already", next_step="resume it, or give another folder")
    return found


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Take back what trainers write into a model's configurations, such as the tokenizer's tokens."""
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    parts = [config, getattr(config, "get_text_config", lambda: None)(), generation]
    kept = [(part, dict(vars(part))) for part in parts if part is not None]
    try:
        yield
    finally:
        for part, values in kept:
            vars(part).clear()
            vars(part).update(values)


class _Run:
    """The rows and the arguments of a run, from which its trainer is made."""

    def __init__(self, model: nn.Module, processing_class: Any, recipe: Recipe, folder: Path) -> None:
        self.model, self.processing_class, self.recipe = model, processing_class, recipe
        self.trainer_class, config = recipe.load_classes()
        with self._refusals(config.__name__):
            self.arguments = config(output_dir=str(folder), **{**_evaluation(recipe), **recipe.arguments})
        self.rows, self.eval_rows = self._load(recipe.data), None
        if recipe.eval_data is not None:
            self.eval_rows = self._load(recipe.eval_data)
        elif recipe.test_size is not None:
            with self._refusals("datasets"):
                parts = self.rows.train_test_split(test_size=recipe.test_size, seed=self.arguments.seed)
            self.rows, self.eval_rows = parts["train"], parts["test"]

    def make_trainer(self, adapters: Mapping[str, Any]) -> Any:
        """Make the trainer of the model compiled with some adapters."""
        from lorac.trainer.trainer import adapter_trainer

        recipe = self.recipe
        active = recipe.active or dict.fromkeys(adapters, 1.0)
        extra = factories.extra_outputs(recipe.loss)
        compiled = lorac.compile(self.model, adapters, active=active, aux=extra)
        return self._construct(adapter_trainer(self.trainer_class), compiled, recipe=recipe)

    def batches(self) -> Iterator[Any]:
        """Yield the first batches of the run, for initialisers."""
        if self.recipe.task in ("dpo", "kto"):
            raise OptionError(
                f"a start from data needs the model's own loss, which {self.recipe.task} has not",
                next_step="begin from a start without data, such as PiSSA, or train by sft first",
            )
        trainer = self._construct(self.trainer_class, lorac.compile(self.model, {}))
        yield from itertools.islice(trainer.get_train_dataloader(), self.recipe.start_batches)

    def _load(self, data: str) -> Any:
        return load_rows(data, self.recipe.task, self.processing_class, self.arguments)

    def _construct(self, trainer_class: Any, compiled: Any, **options: Any) -> Any:
        from transformers import DataCollatorWithPadding, EarlyStoppingCallback

        recipe, rows = self.recipe, {"train_dataset": self.rows, "eval_dataset": self.eval_rows}
        if recipe.early_stopping_patience is not None:
            options["callbacks"] = [EarlyStoppingCallback(recipe.early_stopping_patience)]
        if recipe.task in ("dpo", "kto"):  # the run begins at the base, and the adapters that it trains on
            begun = {name: said for name, said in recipe.adapters.items() if "path" in said}
            given = factories.make_adapters(begun, self.model, self.batches)
            options["ref_model"] = lorac.compile(self.model, given, active=dict.fromkeys(given, 1.0)).eval()
        if recipe.task.endswith("classification"):
            options["compute_metrics"] = _accuracy
        if recipe.task == "sequence-classification":
            options["data_collator"] = DataCollatorWithPadding(self.processing_class)
        with self._refusals(trainer_class.__name__):
            return trainer_class(
                model=compiled, args=self.arguments, processing_class=self.processing_class, **rows, **options
            )

    @contextlib.contextmanager
    def _refusals(self, who: str) -> Iterator[None]:
        """Translate what a library raises about the recipe."""
        try:
            yield
        except LoracError:
            raise
        except Exception as error:  # their checks raise anything, and so do templates
            said = " ".join(str(error).split())
            raise OptionError(
                f"{who} refuses the recipe: {said}", next_step="change the field that it names, or the rows"
            ) from error


def _evaluation(recipe: Recipe) -> dict[str, str]:
    """Return when to evaluate and what to stop by, where a recipe that evaluates does not say it."""
    return {"eval_strategy": "epoch", "metric_for_best_model": "loss"} if recipe.evaluates else {}


def _accuracy(predicted: Any) -> dict[str, float]:
    scores = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    return {"accuracy": float((scores.argmax(-1) == predicted.label_ids).mean())}
