"""Reading the inputs of sites while batches run through the model, which is restored afterwards."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorac.errors import AdapterError, SiteError
from lorac.ir.sites.site import Site, SiteKind

Visit = Callable[[str, Tensor], None]
"""(path of a site, rows (n, in) that it was called with)."""
IGNORED = -100
"""The label of positions that transformers' models leave out of the loss."""


def batches_error(what: str, *, next_step: str = "give at least one batch") -> AdapterError:
    """Return the error for an operation that needs batches of data, with a loss or enough of them."""
    return AdapterError(what, next_step=next_step, code="batches_needed")


@torch.no_grad()
def visit_inputs(
    model: nn.Module, sites: Mapping[str, Site], batches: Iterable[object], visit: Visit, *, labelled: bool
) -> None:
    """Run batches in evaluation mode and pass the inputs of every site to ``visit``.

    Args:
        model: left unchanged.
        sites: linear layers, by path.
        batches: arguments of the model's calls.
        visit: gets the rows of every call, in float32 at least.
        labelled: leave out positions that the batch masks, in ``attention_mask`` or by the label −100.

    Raises:
        SiteError: a site is not a linear layer that is called, or no batch reaches it.
        AdapterError: an input is NaN or infinite.
    """
    for site in sites.values():
        if site.kind is not SiteKind.LINEAR or site.within is not None:
            raise SiteError(
                f"'{site.path}' is a {site.kind}; initialising from activations needs linear layers that are called",
                next_step="narrow targets=, or add the module to exclude=",
            )
    reached: set[str] = set()
    counted: Tensor | None = None

    def watching(path: str) -> Callable[..., None]:
        def watch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            rows = given.detach().to(torch.promote_types(given.dtype, torch.float32))
            if counted is not None and given.shape[:2] == counted.shape:
                rows = rows[counted]
            else:
                rows = rows.flatten(0, -2) if rows.ndim > 1 else rows[None]
            if not rows.isfinite().all():
                raise AdapterError(
                    f"the input of '{path}' is not finite", next_step="look for NaN in the batches", code="non_finite"
                )
            reached.add(path)
            visit(path, rows)

        return watch

    with borrow_model(model, training=False), ExitStack() as hooks:
        for path in sites:
            hooks.enter_context(model.get_submodule(path).register_forward_pre_hook(watching(path), with_kwargs=True))
        for batch in batches:
            counted = _counted_positions(batch) if labelled else None
            call_model(model, batch)
    for path in (path for path in sites if path not in reached):
        raise SiteError(
            f"no batch reaches '{path}'",
            next_step="exclude the layer (exclude=), or give batches that reach it",
            code="site_unreached",
        )


def _counted_positions(batch: object) -> Tensor | None:
    """Return a mask (b, s) of the positions of a batch that count; None for all."""
    found: Tensor | None = None
    if isinstance(batch, Mapping):
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        found = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if isinstance(labels, Tensor) and labels.ndim == 2:
            found = (labels != IGNORED) if found is None else found & (labels != IGNORED)
    return found


@contextmanager
def borrow_model(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Run a model in a mode and restore its state afterwards, also when the run fails."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(device.index for device in devices)):
        try:
            model.train(training)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag, grad in flags:
                parameter.requires_grad_(flag).grad = grad
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


def call_model(model: nn.Module, batch: object) -> Any:
    """Call a model with a batch: a mapping of keywords, a tuple of arguments, or one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
