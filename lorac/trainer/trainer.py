"""Trainers of transformers and TRL that train a recipe's adapters: its optimizer, rules, losses and checkpoints.

    trainer = adapter_trainer(SFTTrainer)(model=compiled, args=arguments, train_dataset=rows, recipe=recipe)
    trainer.train(resume_from_checkpoint=True)  # from the newest finished checkpoint, to the bit

This file alone overrides private functions of ``Trainer``; ``tests/trainer/test_trainer.py`` tests that they are there.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sized
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from lorac.adapters.base_hash import compute_base_hash
from lorac.errors import ArtifactError, OptionError, Unavailable, not_one_of, short, translate_errors
from lorac.formats.native import variant_config
from lorac.storage.strict_json import JsonObject, dump_json
from lorac.trainer import checkpoints, losses
from lorac.trainer.checkpoints import Checkpoint
from lorac.trainer.factories import make_losses, make_optimizer, make_rules
from lorac.trainer.losses import EXPERTS, GATES, SAMPLED
from lorac.trainer.recipe import Recipe
from lorac.training import name_optimizer_state
from lorac.training.rule import Rule
from lorac.training.rules.routing import repeat_rows
from lorac.training.shards import shard_base

_LAYERS, _RESHARD = "transformer_layer_cls_to_wrap", "reshard_after_forward"


class AdapterTrainer(Trainer):
    """``transformers.Trainer`` over a compiled model.

    Args:
        recipe: its optimizer, rules and losses are used, and a checkpoint is bound to all of it.
        reference: the model as the run begins, for a trainer that compares with it and takes no ``ref_model``.
        **settings: of the class below; ``model`` is the result of ``lorac.compile(..., target="eager")``.

    Raises:
        ChoiceError: a tensor learns from an extra output alone, and no loss reads it.
        Unavailable: a loss reads an output that the model does not give; or the model is to lie in parts.
        OptionError: the recipe has a name that does not exist.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any
    _signature_columns: Any

    def __init__(self, *, recipe: Recipe, reference: Any = None, **settings: Any) -> None:
        self.recipe, self.losses = recipe, make_losses(recipe.loss)
        self.rules: list[Rule] | None = None
        arguments = settings["args"]
        beta = getattr(arguments, "beta", None)
        if reference is not None:  # with a beta, TRL would load the base's folder once more
            arguments.beta = 0.0
        # Trainer itself would shard the adapters too.
        sharding = dict(arguments.fsdp_config or {}) if arguments.fsdp else None
        if sharding is not None:
            if hasattr(arguments, "num_generations") or getattr(arguments, "predict_with_generate", False):
                raise Unavailable(
                    "processes that generate call the model one by one, and a base in parts needs all at once",
                    next_step="leave fsdp out, or predict_with_generate",
                )
            for name, value in sharding.items():
                if name not in (_LAYERS, _RESHARD) and str(value).lower() not in ("false", "0", "none") and value != 2:
                    raise Unavailable(
                        f"fsdp_config takes no {name}={short(value)} over a compiled model",
                        next_step=f"it takes {_LAYERS} and {_RESHARD}",
                    )
            arguments.fsdp, arguments.fsdp_plugin_args = False, None
        super().__init__(**settings)
        if reference is not None:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(reference, temperature=arguments.temperature)
            arguments.beta = self.beta = beta
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise Unavailable(
                "accelerate's DeepSpeed and FSDP split adapters, and a compiled model needs whole ones",
                next_step="give fsdp: full_shard in place of deepspeed, and start by torchrun",
            )
        losses.check_learning(self.model, self.losses)
        if GATES in self.losses:
            self.data_collator = losses.collate_experts(self.data_collator)
        if sharding is not None:
            self._base  # noqa: B018  (the hash of the whole base)
            layers, reshard = sharding.get(_LAYERS) or (), bool(sharding.get(_RESHARD, True))
            sharers = [self.model, *filter(None, [getattr(self, "ref_model", None)])]
            shard_base(*sharers, layers=layers, reshard_after_forward=reshard)

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
        """Return the loss as the class below computes it, in training with the recipe's terms."""
        experts = inputs.pop(EXPERTS, None) if GATES in self.losses else None
        if not self.losses or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        draws = self.losses[SAMPLED]["draws"] if SAMPLED in self.losses else 1
        given = repeat_rows(inputs, draws)
        items = None if num_items_in_batch is None else num_items_in_batch * draws
        outputs: list[Any] = []
        with self.model.register_forward_hook(lambda module, args, output: outputs.append(output)):
            result: Any = super().compute_loss(model, given, return_outputs, items)
        loss, *others = result if return_outputs else (result,)
        losses.check_gradients(self.model, self.losses)
        experts = None if experts is None else torch.cat([experts] * draws)
        total = loss + self._share(items) * losses.mean_terms(self.model, self.losses, experts)
        if SAMPLED in self.losses:
            shifted = getattr(self, "_loss_shifts_labels", False)
            total = total + losses.policy_term(self.model, draws, loss, outputs[-1], given.get("labels"), shifted)
        return (total, *others) if return_outputs else total

    def _share(self, num_items_in_batch: torch.Tensor | int | None) -> float:
        """Return the share of one call's mean in a step whose loss Trainer does not divide by its calls."""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or self.compute_loss_func is not None
        return 1 / self.current_gradient_accumulation_steps if scaled else 1.0

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if GATES in self.losses and EXPERTS not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, EXPERTS]

    def train(self, resume_from_checkpoint: Checkpoint | str | bool | None = None, *args: Any, **settings: Any) -> Any:
        """Train as ``Trainer`` does; resume from a checkpoint, its folder, or, with True, the run's newest.

        Raises:
            OptionError: no step can be taken as the arguments say.
            ArtifactError: the checkpoint was not finished, changed since, or holds no state that goes on.
            ChoiceError: it is of another run, or there is none.
        """
        found: Any = resume_from_checkpoint or None
        if found is True:
            found = checkpoints.find_checkpoint(Path(str(self.args.output_dir)))
        elif isinstance(found, str):
            found = checkpoints.open_checkpoint(found)
        if found is None:
            refusal = f"{type(self).__name__} refuses the recipe"
            refusals = translate_errors(self.recipe.refuse, refusal, unless=lambda: self.state.global_step > 0)
        else:
            found.check_run(self._describe_run())
            refusal = f"the run cannot go on from '{found.folder}'"
            refusals = translate_errors(ArtifactError, refusal, unless=lambda: self.state.global_step > found.step)
        if self.args.max_steps <= 0 >= self.args.num_train_epochs:
            raise OptionError(
                f"a run of {self.args.num_train_epochs:g} epochs takes no step",
                next_step="give num_train_epochs a number above 0, or max_steps",
            )
        least, rows = self.args.train_batch_size * self.args.world_size, self.train_dataset
        if self.args.dataloader_drop_last and isinstance(rows, Sized) and len(rows) < least:
            raise OptionError(
                f"the run has {len(rows)} rows, and dataloader_drop_last leaves out a batch of fewer than {least}",
                next_step="give more rows or a smaller per_device_train_batch_size, or leave dataloader_drop_last out",
            )
        with refusals:
            return super().train(None if found is None else str(found.folder), *args, **settings)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = self.args.metric_for_best_model
        if name is not None and f"eval_{name.removeprefix('eval_')}" not in metrics:
            known = [key.removeprefix("eval_") for key in metrics]
            raise not_one_of("no evaluation gives the metric_for_best_model", name, known)
        return super()._determine_best_metric(metrics, trial)

    @functools.cached_property
    def _rows_hash(self) -> str | None:
        """The hash of the rows that are trained on, in their order; None where they are not a table."""
        with_format = getattr(self.train_dataset, "with_format", None)
        if with_format is None or not isinstance(self.train_dataset, Sized):
            return None
        digest = hashlib.blake2b(digest_size=16)
        for table in with_format("arrow").iter(1000):
            for batch in table.replace_schema_metadata(None).combine_chunks().to_batches():
                digest.update(batch.serialize())
        return digest.hexdigest()

    def create_model_card(self, *_: Any, **settings: Any) -> None:
        """Write the README.md of the run's folder, with its adapters, their methods and their base."""
        if not self.is_world_process_zero():
            return
        base = self.recipe.model or getattr(self.model.config, "_name_or_path", "") or "the model given"
        adapters = "".join(f"- `{name}`: {one.variant.name}\n" for name, one in sorted(self.model.adapters.items()))
        text = f"# Adapters trained by lorac\n\nBase: {base}\n\n{adapters}\nLoad one by `lorac.compile(model, path)`.\n"
        Path(str(self.args.output_dir), "README.md").write_text(
            f"---\nlibrary_name: lorac\n---\n\n{text}", encoding="utf-8"
        )

    @functools.cached_property
    def _base(self) -> str | None:
        """The hash of the base's weights at all sites, but for quantised ones."""
        sites = self.model.session.view.sites
        weights = [path for path, site in sites.items() if site.weight is not None and not site.packed]
        return compute_base_hash(self.model.session.view, weights)

    def _describe_run(self) -> JsonObject:
        """Return the description of the run that a checkpoint is bound to."""
        adapters = {
            name: {"method": adapter.variant.name, "settings": variant_config(adapter.variant)[0]}
            for name, adapter in self.model.adapters.items()
        }
        rows = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
        run = {"adapters": adapters, "recipe": dataclasses.asdict(self.recipe), "base": self._base, "rows": rows}
        run |= {checkpoints.ROWS_HASH: self._rows_hash}
        described: JsonObject = json.loads(dump_json({**run, "processes": self.args.world_size}))
        return described

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_folder = self._get_output_dir(trial)
        folder = Path(run_folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:  # an older checkpoint there is about to be written over
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


def adapter_trainer(base: type[Trainer]) -> type[Any]:
    """Return a class that trains as ``Trainer`` or one of TRL's trainers does, with the additions of this file."""
    return type(f"Adapter{base.__name__}", (AdapterTrainer, base), {})
