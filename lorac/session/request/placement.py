"""Where a compiled model runs, and where its host is for that: the two differ where a program is emitted."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from lorac.session.request.sources import check_device
from lorac.target.backend import Backend, TargetOptions

_CPU = torch.device("cpu")
_WITHOUT_DEVICE = ("cpu", "meta")


def resolve_placement(
    backend: Backend[TargetOptions], options: TargetOptions, device: torch.device | None, model: nn.Module | None = None
) -> tuple[TargetOptions, torch.device | None]:
    """The target's options for a device, and the device that the host is to be brought to; None: it stays.

    A host that runs itself runs on the device. One from which a program is emitted is read, captured and held against
    it on the CPU, which asks nothing of torch's own build.

    Args:
        backend: the target's.
        options: as they were told.
        device: what was asked for; None: where the model is.
        model: the host; None where there is only a stored program.

    Raises:
        OptionError: torch, or the target, does not run on it.
        Unavailable: this machine lacks what the target takes to run there.
    """
    if not backend.dialect_for(options).emits:
        check_device(device)
        return options, device
    own = _model_device(model)
    asked = device if device is not None or own.type == "cpu" else own
    return backend.place_options(options, asked), None if own.type == "cpu" else _CPU


def _model_device(model: nn.Module | None) -> torch.device:
    """Where a model's first tensor is that is on a device of its own; the CPU, if there is none."""
    if model is None:
        return _CPU
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type not in _WITHOUT_DEVICE), _CPU)
