"""One run of a recipe: rows, a compiled model and the task's trainer, put together."""

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

from torch import distributed, nn

import lorac
from lorac.errors import ChoiceError, FormatError, OptionError, translate_errors, translate_import_errors
from lorac.session.compiled import CompiledModule
from lorac.session.model_folders import outline_model
from lorac.storage.paths import file_stems, parse_path
from lorac.storage.remote import find_source
from lorac.trainer import checkpoints, factories, losses
from lorac.trainer.data import check_ids, load_rows
from lorac.trainer.recipe import OWN_LOSS, TASKS, Recipe
from lorac.training import loram
from lorac.training.shards import gather_base
from lorac.variants.adapter import Adapter


@translate_import_errors()
def train(
    model: nn.Module, processing_class: Any, recipe: Recipe, out: str | Path, *, resume: bool = False
) -> CompiledModule:
    """Train the adapters of a recipe, under ``torchrun`` or ``accelerate launch`` on several processes.

    Args:
        model: the base, left unchanged.
        processing_class: the model's tokenizer, or its processor for images. Left unchanged.
        recipe: the run's settings.
        out: a folder without a run; it gets each adapter, in PEFT's format or, if that cannot store it, in lorac's, the
            trainer's checkpoints, ``trainer_state.json`` with everything it logged, and ``loss.svg``.
        resume: continue from the newest checkpoint in ``out``, bit for bit as if the run had not stopped.

    Returns:
        The model compiled for eager with the trained adapters, in eval mode.

    Raises:
        MissingExtra: TRL, ``datasets`` or transformers is not installed.
        ChoiceError: ``out`` holds a run already, or none to resume.
        OptionError: the trainer, or its dataclass of arguments, refuses the recipe.
        LoracError: as the recipe's names, files and data raise it.
    """
    folder = parse_path(out, "out", OptionError)
    checkpoint = checkpoints.find_checkpoint(folder) if resume else None
    if not resume and (checkpoints.list_checkpoints(folder) or (folder / "trainer_state.json").exists()):
        raise ChoiceError(
            f"'{folder}' holds a run already", next_step="continue it by resume=True, or give another folder"
        )
    from lorac.trainer.log import draw_losses

    run = _Run(model, copy.deepcopy(processing_class), recipe, folder)
    trainer = run.make_trainer(None if checkpoint is None else checkpoint.adapters(model))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_state()
    compiled: CompiledModule = trainer.model
    names = sorted(compiled.adapters) if trainer.is_world_process_zero() else ()
    with gather_base(compiled):
        for name, stem in file_stems(names, reserved=checkpoints.FOLDER).items():
            adapter = run.recover(compiled.adapters[name])
            form = "peft"
            try:
                lorac.save_adapter(adapter, folder / stem, model=run.host)
            except FormatError as error:
                if error.code != "unsupported_field":
                    raise
                form = "native"
                lorac.save_adapter(adapter, folder / f"{stem}.safetensors", format=form, model=run.host)
            if recipe.push is not None:
                adapter.push_to_hub(recipe.push + f"-{stem}" * (len(names) > 1), model=run.host, format=form)
        if names:
            (folder / "loss.svg").write_text(draw_losses(trainer.state.log_history), encoding="utf-8")
        if names and recipe.merge is not None:
            merged: Any = lorac.merge_into(model, compiled.adapters, dict(compiled.choice))
            merged.save_pretrained(recipe.merge)
            processing_class.save_pretrained(recipe.merge)
    trainer.accelerator.wait_for_everyone()
    return compiled.eval()


class _Run:
    """The rows and the arguments of a run, and its trainer's maker."""

    def __init__(self, model: nn.Module, processing_class: Any, recipe: Recipe, folder: Path) -> None:
        from transformers import DataCollatorForSeq2Seq, set_seed

        self.model, self.recipe = model, recipe
        self.host, self.kept = model, None
        if recipe.recover:  # the large model without its weights, and the rows and columns that its smaller copy keeps
            large, pruned = (find_source(recipe.recover[name], name, OptionError) for name in ("model", "pruned"))
            self.host = outline_model(large)
            if pruned.is_dir():
                self.kept = loram.read_removed_units(pruned, self.host)
            else:
                self.kept = loram.read_pruning_record(pruned)
        self.trainer_class, config = recipe.load_classes()
        evaluation = {"eval_strategy": "epoch", "metric_for_best_model": "loss"} if recipe.evaluates else {}
        with translate_errors(recipe.refuse, f"{config.__name__} refuses the recipe"):
            arguments = config(
                output_dir=str(folder), **{**TASKS[recipe.task].defaults, **evaluation, **recipe.arguments}
            )
            set_seed(arguments.seed)
        if recipe.chat_template is not None:
            processing_class.chat_template = factories.read_chat_template(recipe.chat_template)
        given = [data for data in (recipe.data, recipe.eval_data) if data is not None]
        options = {"streaming": True} if recipe.streaming else {}
        rows = [load_rows(data, recipe.task, processing_class, arguments, **options) for data in given]
        with translate_errors(recipe.refuse, "datasets refuses the recipe"):
            if len(rows) == 2 and (names := getattr((rows[0].features or {}).get("labels"), "names", None)):
                numbers = {name: number for number, name in enumerate(names)}
                form = rows[1].format  # of pictures, which a function reads
                rows[1] = rows[1].with_format(None).align_labels_with_mapping(numbers, "labels")
                rows[1] = rows[1].with_format(form["type"], form["columns"], **form["format_kwargs"])
            if recipe.test_size is not None:
                rows = [*rows[0].train_test_split(test_size=recipe.test_size, seed=arguments.seed).values()]
        self.settings: dict[str, Any] = {
            "args": arguments,
            "processing_class": processing_class,
            **dict(zip(("train_dataset", "eval_dataset"), rows, strict=False)),
            **({"compute_metrics": _accuracy} if recipe.task.endswith("classification") else {}),
        }
        if recipe.task == "seq2seq":
            self.settings["data_collator"] = DataCollatorForSeq2Seq(processing_class)
        if recipe.reward_funcs:
            self.settings["reward_funcs"] = factories.make_rewards(recipe.reward_funcs)

    def make_trainer(self, adapters: Mapping[str, Any] | None) -> Any:
        """Make the trainer of the model compiled with some adapters; None: those that the recipe begins with."""
        from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback

        from lorac.trainer.log import LogLines
        from lorac.trainer.trainer import adapter_trainer

        recipe, options = self.recipe, dict[str, Any](recipe=self.recipe)
        if adapters is None:
            adapters = factories.make_adapters(recipe.adapters, self.model, self._batches)
        if recipe.early_stopping_patience is not None:
            options["callbacks"] = [EarlyStoppingCallback(recipe.early_stopping_patience)]
        reference = "ref_model" if "ref_model" in inspect.signature(self.trainer_class).parameters else "reference"
        # A run begins at the base with the adapters that it trains on.
        if reference == "ref_model" or (recipe.reward_funcs and self.settings["args"].beta):
            given = {name: fields for name, fields in recipe.adapters.items() if "path" in fields}
            begun = factories.make_adapters(given, self.model, self._batches)
            options[reference] = lorac.compile(self.model, begun, active=dict.fromkeys(begun, 1.0)).eval()
        active = recipe.active or dict.fromkeys(adapters, 1.0)
        aux = losses.extra_outputs(factories.make_losses(recipe.loss))
        compiled = lorac.compile(self.model, adapters, active=active, aux=aux)
        for adapter in compiled.adapters.values():
            self.recover(adapter)  # refused before the training, where it cannot be after it
        trainer = self._construct(adapter_trainer(self.trainer_class), compiled, **options)
        for callback in (PrinterCallback, ProgressCallback):  # they print mappings of Python
            trainer.remove_callback(callback)
        trainer.add_callback(LogLines())
        host: Any = self.model
        pictured = recipe.task in ("vlm", "image-classification")
        for rows in () if pictured else (trainer.train_dataset, trainer.eval_dataset):
            if isinstance(rows, Sized):
                check_ids(rows, trainer.processing_class, host.get_input_embeddings().num_embeddings)
        return trainer

    def recover(self, adapter: Adapter) -> Adapter:
        """Return an adapter for the large model where the recipe names one, else the adapter."""
        return adapter if self.kept is None else loram.recover(adapter, self.kept, self.host)

    def _batches(self) -> Iterator[Any]:
        """Yield the first batches of the run, for initialisers."""
        if self.recipe.task not in OWN_LOSS:
            raise OptionError(
                f"a start from data needs the model's own loss, which {self.recipe.task} does not use",
                next_step="begin from a start without data, such as PiSSA, or train by sft first",
            )
        trainer = self._construct(self.trainer_class, lorac.compile(self.model, {}))
        yield from itertools.islice(trainer.get_train_dataloader(), self.recipe.start_batches)

    def _construct(self, trainer_class: Any, compiled: Any, **options: Any) -> Any:
        with translate_errors(self.recipe.refuse, f"{trainer_class.__name__} refuses the recipe"):
            return trainer_class(model=compiled, **self.settings, **options)


def leave_process_group() -> None:
    """Leave torch's default process group, if any; the interpreter's end with a group may abort or hang.

    Every process of the group has to call it.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    # The group's end waits for its threads with Python's lock held. One of them may need that to let go of a gathered
    # tensor, and gets it while this process waits for the others.
    distributed.barrier()
    distributed.destroy_process_group()


def _accuracy(predicted: Any) -> dict[str, float]:
    scores = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    return {"accuracy": float((scores.argmax(-1) == predicted.label_ids).mean())}
