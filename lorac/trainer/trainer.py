"""Trainers of transformers and TRL that train a recipe's adapters: its optimizer, rules, losses and checkpoints.

    trainer = adapter_trainer(SFTTrainer)(model=compiled, args=arguments, train_dataset=rows, recipe=recipe)
    trainer.train(resume_from_checkpoint=True)  # from the newest finished checkpoint, to the bit

This file alone overrides private functions of ``Trainer``; ``tests/trainer/test_trainer.py`` says what is relied on.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from lorac.errors import ArtifactError, ChoiceError, LoracError, OptionError, Unavailable
from lorac.trainer import checkpoints, losses
from lorac.trainer.factories import make_losses, make_optimizer, make_rules
from lorac.trainer.losses import EXPERTS, GATES, SAMPLED
from lorac.trainer.recipe import Recipe
from lorac.training import name_optimizer_state
from lorac.training.rule import Rule
from lorac.training.rules.routing import repeat_rows

_OWN_OPTIMIZER = ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
"""Arguments of Trainer's own optimizer."""


class AdapterTrainer(Trainer):
    """``transformers.Trainer`` over a compiled model.

    Args:
        recipe: its optimizer, rules and losses are used, and a checkpoint is bound to all of it.
        **settings: of ``Trainer``, or of the class below it; ``model`` is what ``lorac.compile(..., target="eager")``
            returned.

    Raises:
        ChoiceError: a tensor learns from an extra output alone, and no loss reads it.
        Unavailable: a loss reads what the model does not give.
        OptionError: the recipe names what does not exist, or an optimizer and arguments of Trainer's own.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any
    _signature_columns: Any

    def __init__(self, *, recipe: Recipe, **settings: Any) -> None:
        self.recipe, self.losses = recipe, make_losses(recipe.loss)
        self.rules: list[Rule] | None = None
        super().__init__(**settings)
        self._check_recipe()
        if GATES in self.losses:
            self.data_collator = losses.collate_experts(self.data_collator)

    def _check_recipe(self) -> None:
        losses.check_learning(self.model, self.losses)
        for name in {*losses.extra_outputs(self.losses)} - {*self.model.session.options.aux}:
            what = f"a loss of the recipe reads '{name}', which the model does not give"
            raise Unavailable(what, next_step=f'compile with aux=["{name}"]')
        foreign = next((name for name in _OWN_OPTIMIZER if name in self.recipe.arguments), None)
        if self.recipe.optimizer is not None and foreign is not None:
            what = f"{foreign} is of Trainer's own optimizer, and the recipe names another"
            raise OptionError(what, next_step="give it as a keyword of optimizer:, or leave optimizer: out")

    # --- Steps ---------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the recipe's optimizer, or else that of the arguments, and attach the recipe's rules to it."""
        if self.optimizer is None and self.recipe.optimizer is not None:
            self.optimizer = make_optimizer(self.recipe.optimizer, self.model, self.args.learning_rate)
        super().create_optimizer(model)
        if self.rules is None:
            self.rules = make_rules(self.recipe.rules, self.model, self.optimizer)
            name_optimizer_state(self.model, self.optimizer)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss as the class below computes it, in training with what the recipe adds."""
        experts = inputs.pop(EXPERTS, None) if GATES in self.losses else None
        if not self.losses or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        draws = self.losses[SAMPLED]["draws"] if SAMPLED in self.losses else 1
        given = repeat_rows(inputs, draws)
        items = None if num_items_in_batch is None else num_items_in_batch * draws
        outputs: list[Any] = []
        handle = self.model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            result: Any = super().compute_loss(model, given, return_outputs, items)
        finally:
            handle.remove()
        loss, *others = result if return_outputs else (result,)
        losses.check_gradients(self.model, self.losses)
        experts = None if experts is None else torch.cat([experts] * draws)
        total = loss + self._share(items) * losses.mean_terms(self.model, self.losses, experts)
        if SAMPLED in self.losses:
            shifted = getattr(self, "_loss_shifts_labels", False)
            total = total + losses.policy_term(self.model, draws, loss, outputs[-1], given.get("labels"), shifted)
        return (total, *others) if return_outputs else total

    def _share(self, num_items_in_batch: torch.Tensor | int | None) -> float:
        """Return what a mean over one call counts in a step whose loss Trainer does not divide by its calls."""
        counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        scaled = counted or self.compute_loss_func is not None
        if self.loss_is_scaled_for_ga is not None:
            scaled = self.loss_is_scaled_for_ga
        return 1 / self.current_gradient_accumulation_steps if scaled else 1.0

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if GATES in self.losses and EXPERTS not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, EXPERTS]

    # --- Checkpoints ---------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **settings: Any) -> Any:
        """Train as ``Trainer`` does.

        Args:
            resume_from_checkpoint: the folder of a checkpoint; True: the newest in the output's folder.
            *args, **settings: of ``Trainer.train``.

        Raises:
            ArtifactError: the checkpoint was not finished, or changed since.
            ChoiceError: it is of another run, or there is none.
        """
        folder = self._open(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(folder, *args, **settings)

    def _open(self, given: str | bool) -> str:
        named = None if given is True else checkpoints.open_checkpoint(str(given))
        found = named or checkpoints.find_checkpoint(Path(str(self.args.output_dir)))
        if found is None:
            what = f"'{self.args.output_dir}' holds no finished checkpoint"
            raise ChoiceError(what, next_step="train without resuming")
        found.check_run(self._describe_run())
        return str(found.folder)

    @functools.cached_property
    def _base(self) -> str | None:
        return checkpoints.hash_base(self.model)

    def _describe_run(self) -> dict[str, Any]:
        rows = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
        return checkpoints.describe_run(self.model, self.recipe, self._base, rows, self.args.world_size)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = self._get_output_dir(trial)
        folder = Path(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            # The manifest of an older checkpoint, which is about to be written over.
            (folder / checkpoints.MANIFEST).unlink(missing_ok=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        if not self.args.save_only_model:
            checkpoints.finish_checkpoint(folder, self.state.global_step, self._describe_run())
        rotate_checkpoints(run_folder, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _refusals(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _refusals(checkpoint):
            super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def _refusals(checkpoint: str | None) -> Iterator[None]:
    """Translate what the readers of pickles, and those who are given their content, raise for garbage."""
    try:
        yield
    except LoracError:
        raise
    except Exception as error:
        raise ArtifactError(f"'{checkpoint}' holds no state of this run: {error}") from error


def adapter_trainer(base: type[Trainer]) -> type[Any]:
    """Return a class that trains as ``base`` does, with what ``AdapterTrainer`` adds.

    Args:
        base: ``transformers.Trainer``, or one of TRL's trainers.
    """
    return AdapterTrainer if base is Trainer else type(f"Adapter{base.__name__}", (AdapterTrainer, base), {})
