"""Gradients of base weights, summed over batches; besides the sums, only one weight's gradient is ever in memory."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorac.errors import AdapterError, SiteError
from lorac.frontend.base_weights import read_stored_tensor
from lorac.ir.sites.site import Site, factor_dtype
from lorac.training.initialisation.activations import batches_error, borrow_model, call_model

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> the loss, a scalar."""


@dataclass(frozen=True)
class SummedGradients:
    """Gradients of weights, summed over batches.

    Attributes:
        sums: path of a site -> ΣG (out, in), in the dtype of factors; for a stack (E, out, in).
        batches: number of batches.
    """

    sums: Mapping[str, Tensor]
    batches: int


def compute_loss(model: nn.Module, batch: object) -> Tensor:
    """Return the loss that a model computes itself.

    Raises:
        AdapterError: its output has no loss.
    """
    answer = call_model(model, batch)
    loss = answer.get("loss") if isinstance(answer, Mapping) else getattr(answer, "loss", None)
    if not isinstance(loss, Tensor):
        raise batches_error(
            f"the model's output for a batch, {type(answer).__name__}, has no loss",
            next_step="give batches with labels, or a loss: loss=lambda model, batch: …, a scalar",
        )
    return loss


def sum_gradients(
    model: nn.Module, sites: Mapping[str, Site], batches: Iterable[object], loss: Loss | None = None
) -> SummedGradients:
    """Sum the gradients of the weights of some sites over batches, in training mode, as the paper's code does.

    Args:
        model: left unchanged.
        sites: by path.
        batches: arguments of the model's calls.
        loss: default: the model's own.

    Raises:
        AdapterError: there is no batch, or none with a loss.
        SiteError: a weight is not a parameter, or no batch gives it a gradient.
        AdapterError: a gradient is NaN or infinite.
    """
    owners: dict[str, list[str]] = {}
    for path, site in sites.items():
        assert site.weight is not None
        if not isinstance(read_stored_tensor(model, site.weight), nn.Parameter):
            raise SiteError(
                f"the weight of '{site.path}' is not a parameter, so it has no gradient",
                next_step="narrow targets=, or add the module to exclude=",
            )
        owners.setdefault(site.weight, []).append(path)
    sums: dict[str, Tensor] = {}
    count = 0
    with borrow_model(model, training=True), torch.enable_grad(), ExitStack() as hooks:
        _accumulate_gradients(model, {name: sites[paths[0]] for name, paths in owners.items()}, sums, hooks)
        for batch in batches:
            found = (loss or compute_loss)(model, batch)
            if found.requires_grad:  # sites without a gradient are refused afterwards
                found.backward()
            count += 1
    if not count:
        raise batches_error("there are no batches to take gradients of")
    for name, (path, *_) in owners.items():
        if name not in sums:
            raise SiteError(
                f"no batch gives the weight of '{path}' a gradient",
                next_step="exclude the layer (exclude=), or give batches that reach it",
                code="site_unreached",
            )
        if not sums[name].isfinite().all():
            raise AdapterError(
                f"the gradient of the weight of '{path}' is not finite",
                next_step="look for NaN in the batches, or compute in float32",
                code="non_finite",
            )
    return SummedGradients({path: sums[name] for name, paths in owners.items() for path in paths}, count)


def _accumulate_gradients(
    model: nn.Module, sites: Mapping[str, Site], sums: dict[str, Tensor], hooks: ExitStack
) -> None:
    """Add every weight's gradient to its sum, and free it, as soon as backward has computed it."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None

    def adding(name: str, site: Site) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            found = site.present(parameter.grad).to(factor_dtype(site.dtype))
            sums[name] = sums[name] + found if name in sums else found.clone()
            parameter.grad = None

        return add

    for name, site in sites.items():
        weight = read_stored_tensor(model, name)
        weight.requires_grad_(True)
        hooks.enter_context(weight.register_post_accumulate_grad_hook(adding(name, site)))
