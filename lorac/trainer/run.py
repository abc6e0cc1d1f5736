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
from lorac.errors import ChoiceError, LoracError, OptionError
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
        out: the folder of the run; without ``resume`` it must not hold one yet.
        resume: continue from the newest checkpoint in ``out``, bit for bit as if the run had not stopped.

    Returns:
        The model compiled for eager with the trained adapters, in eval mode.

    Raises:
        MissingExtra: TRL, ``datasets`` or transformers is not installed.
        ChoiceError: ``out`` holds a run already, or none to resume.
        OptionError: the trainer, or its dataclass of arguments, refuses the recipe.
        LoracError: what the recipe's names, files and data raise.
    """
    folder = parse_path(out, "out", OptionError)
    found = _find_checkpoint(folder, resume)
    with _unchanged(model):
        run = _Run(model, copy.deepcopy(processing_class), recipe, folder)
        adapters = run.make_adapters(recipe.adapters) if found is None else found.adapters(model)
        trainer = run.make_trainer(adapters)
        trainer.train(resume_from_checkpoint=None if found is None else str(found.folder))
        trainer.save_state()
        compiled: CompiledModule = trainer.model
        if trainer.is_world_process_zero():
            checkpoints.save_trained_adapters(compiled.adapters, folder, model)
        trainer.accelerator.wait_for_everyone()
    return compiled.eval()


def _find_checkpoint(folder: Path, resume: bool) -> checkpoints.Checkpoint | None:
    """Return the checkpoint to continue from; None for a new run."""
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
    """Restore a model's configurations, into which trainers write, for example the tokenizer's tokens."""
    config, generation = getattr(model, "config", None), getattr(model, "generation_config", None)
    parts = [config, getattr(config, "get_text_config", lambda: None)(), generation]
    kept = [(part, dict(vars(part))) for part in parts if part is not None]
    try:
        yield
    finally:
        for part, values in kept:
            vars(part).clear()
            vars(part).update(values)


@contextlib.contextmanager
def _refusals(who: str) -> Iterator[None]:
    """Translate what a library raises about the recipe."""
    try:
        yield
    except LoracError:
        raise
    except Exception as error:  # their checks raise anything, and so do templates
        said = " ".join(str(error).split())
        step = "change the field that it names, or the rows"
        raise OptionError(f"{who} refuses the recipe: {said}", next_step=step) from error


class _Run:
    """The rows and the arguments of a run, from which its trainer is made."""

    def __init__(self, model: nn.Module, processing_class: Any, recipe: Recipe, folder: Path) -> None:
        self.model, self.processing_class, self.recipe = model, processing_class, recipe
        self.is_preference, self.is_classification = recipe.task in ("dpo", "kto"), "classification" in recipe.task
        self.trainer_class, config = recipe.load_classes()
        evaluation = {"eval_strategy": "epoch", "metric_for_best_model": "loss"} if recipe.evaluates else {}
        with _refusals(config.__name__):
            self.arguments = config(output_dir=str(folder), **{**evaluation, **recipe.arguments})
        data = [recipe.data] if recipe.eval_data is None else [recipe.data, recipe.eval_data]
        rows = [load_rows(one, recipe.task, processing_class, self.arguments) for one in data]
        if recipe.test_size is not None:
            with _refusals("datasets"):
                split = rows[0].train_test_split(test_size=recipe.test_size, seed=self.arguments.seed)
            rows = [split["train"], split["test"]]
        self.rows = dict(zip(("train_dataset", "eval_dataset"), rows, strict=False))

    def make_adapters(self, given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Make adapters from the run's seed."""
        from transformers import set_seed

        set_seed(self.arguments.seed)
        return factories.make_adapters(given, self.model, self._batches)

    def make_trainer(self, adapters: Mapping[str, Any]) -> Any:
        """Make the trainer of the model compiled with some adapters."""
        from transformers import EarlyStoppingCallback

        from lorac.trainer.trainer import adapter_trainer

        recipe, options = self.recipe, dict[str, Any](recipe=self.recipe)
        if recipe.early_stopping_patience is not None:
            options["callbacks"] = [EarlyStoppingCallback(recipe.early_stopping_patience)]
        if self.is_preference:  # the run begins at the base with the adapters that it trains on
            begun = self.make_adapters({name: said for name, said in recipe.adapters.items() if "path" in said})
            options["ref_model"] = lorac.compile(self.model, begun, active=dict.fromkeys(begun, 1.0)).eval()
        active = recipe.active or dict.fromkeys(adapters, 1.0)
        compiled = lorac.compile(self.model, adapters, active=active, aux=factories.extra_outputs(recipe.loss))
        return self._construct(adapter_trainer(self.trainer_class), compiled, **options)

    def _batches(self) -> Iterator[Any]:
        """Yield the first batches of the run, for initialisers."""
        if self.is_preference:
            raise OptionError(
                f"a start from data needs the model's own loss, which {self.recipe.task} does not use",
                next_step="begin from a start without data, such as PiSSA, or train by sft first",
            )
        trainer = self._construct(self.trainer_class, lorac.compile(self.model, {}))
        yield from itertools.islice(trainer.get_train_dataloader(), self.recipe.start_batches)

    def _construct(self, trainer_class: Any, compiled: Any, **options: Any) -> Any:
        if self.is_classification:
            options["compute_metrics"] = _accuracy
        with _refusals(trainer_class.__name__):
            return trainer_class(
                model=compiled, args=self.arguments, processing_class=self.processing_class, **self.rows, **options
            )


def _accuracy(predicted: Any) -> dict[str, float]:
    scores = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    return {"accuracy": float((scores.argmax(-1) == predicted.label_ids).mean())}
