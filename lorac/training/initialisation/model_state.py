"""Running a model and restoring it: modes, flags, gradients, buffers and the random state."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


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
