"""Mapping a LoRA of a smaller model to the large one, and aligning the smaller model after pruning."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lorac.adapters.fit import check_adapter
from lorac.errors import AdapterNotFound, not_one_of, shape_error
from lorac.frontend.model_view import ModelView
from lorac.training.initialisation.activations import batches_error
from lorac.training.initialisation.gradients import Loss, compute_loss
from lorac.training.loram.pruning import PrunedModel
from lorac.training.loram.pruning_record import PruningRecord
from lorac.variants.adapter import Adapter
from lorac.variants.lora import LoRA

FILLS = ("zeros", "normal")
_WARMUP = 100
"""The most steps of the warm-up of ``align``."""


def recover(adapter: Adapter, kept: Mapping[str, PruningRecord], model: nn.Module, *, fill: str = "zeros") -> Adapter:
    """Map a LoRA of a smaller model to the large one: A's columns and B's rows in their old places, 0 elsewhere.

    ΔW of the large weight is s·B·A at the rows and columns kept, and 0 elsewhere.

    Args:
        adapter: trained on the smaller model; only read.
        kept: as ``PrunedModel.kept`` has it, or ``read_pruning_record`` returns it.
        model: the large one; only read.
        fill: ``"zeros"``; or ``"normal"``, the authors' other choice: missing columns of A are N(0, 1/r²), so that the
            large model changes at once where columns were pruned.

    Raises:
        AdapterNotFound: the adapter is of another method.
        AdapterError: the adapter is not of the smaller model, or the smaller model not of this large one.
        OptionError: there is no such fill.
        SiteError, AdapterError: the result does not fit the large model.
    """
    if not isinstance(adapter.variant, LoRA):
        raise AdapterNotFound(
            f"'{adapter.name}' is {adapter.variant.name}, and lorac recovers LoRAs alone",
            next_step="make a LoRA of it on the smaller model: lorac.to_lora",
        )
    if fill not in FILLS:
        raise not_one_of("there is no fill", fill, FILLS)
    view, generator = ModelView.of(model), torch.Generator().manual_seed(0)
    sites, tensors = view.sites, {}
    for path, own in adapter.tensors.items():
        one = kept.get(path)
        if one is not None and path in sites and one.shape != (sites[path].out_features, sites[path].in_features):
            raise shape_error(
                f"'{path}' was pruned from a weight of {list(one.shape)}, and the model's is "
                f"[{sites[path].out_features}, {sites[path].in_features}]",
                next_step="give the large model that the smaller one was pruned from",
            )
        tensors[path] = dict(own)
        if one is None:
            continue
        a, b = own["lora_A"].detach(), own["lora_B"].detach()
        if (held := (b.shape[0], a.shape[1])) != one.small:
            raise shape_error(
                f"'{adapter.name}' has {list(held)} at '{path}', and the smaller model {list(one.small)}",
                next_step="give the adapter of that smaller model, or the kept= of the adapter's model",
            )
        (out, columns), r = one.shape, len(a)
        wide = a.new_zeros(r, columns) if fill == "zeros" else torch.randn(r, columns, generator=generator).to(a) / r
        wide[:, one.columns] = a
        tensors[path] = {"lora_A": wide, "lora_B": b.new_zeros(out, r).index_copy(0, one.rows, b)}
        if "lora_bias" in own:
            bias = own["lora_bias"].detach()
            tensors[path]["lora_bias"] = bias.new_zeros(out).index_copy(0, one.rows, bias)
    recovered = Adapter(adapter.name, adapter.variant, tensors, dict(adapter.replaced))
    check_adapter(recovered, view)
    return recovered


def align(
    smaller: PrunedModel,
    batches: Iterable[object],
    *,
    steps: int,
    lr: float = 5e-5,
    loss: Loss | None = None,
    each: Callable[[int, float], None] | None = None,
) -> None:
    """Train all of a smaller model, but its head, to make up for the loss by pruning; masked weights stay 0.

    AdamW with a linear warm-up and a cosine to 0, the paper's. Recovery also works without it, less well.

    Args:
        smaller: its model is trained in place.
        batches: arguments of the model's calls, one a step.
        steps: how many steps; with fewer batches it ends where they do.
        lr: the largest learning rate.
        loss: (model, batch) -> the loss; default: the model's own.
        each: called after every step with its number and loss.

    Raises:
        AdapterError: there are no batches, or none with a loss.
    """
    model, rising = smaller.model, min(_WARMUP, steps // 10)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    frozen = set() if head is None else {id(parameter) for parameter in head.parameters()}
    trained = [parameter for parameter in model.parameters() if id(parameter) not in frozen]
    optimizer = torch.optim.AdamW(trained, lr=lr)

    def rate(step: int) -> float:
        risen = (step + 1) / max(rising, 1)
        return min(risen, 0.5 * (1 + math.cos(math.pi * max(step - rising, 0) / max(steps - rising, 1))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    step, mode = -1, model.training
    model.train()
    for step, batch in zip(range(steps), batches, strict=False):
        found = (loss or compute_loss)(model, batch)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for name, mask in smaller.masks.items():
                model.get_parameter(name).mul_(mask)
        if each is not None:
            each(step, float(found.detach()))
    model.train(mode)
    if step < 0:
        raise batches_error("there are no batches to align with")
