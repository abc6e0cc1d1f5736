"""The device of the result, and the device of the model while it is compiled; they differ for emitted programs."""

import itertools

import torch
from torch import nn

from lorac.errors import OptionError
from lorac.target.backend import Backend, TargetOptions

_CPU = torch.device("cpu")
_DEVICE_ADVICE = "leave device= out to stay where the model is; 'cuda' takes a GPU, and torch built for it"


def parse_device(device: str | torch.device | None) -> torch.device | None:
    """Return a device by its name, whether or not this machine has it.

    Raises:
        OptionError: it is not the name of a device.
    """
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise _unusable_device(device, error) from error


def resolve_placement(
    backend: Backend[TargetOptions], options: TargetOptions, device: torch.device | None, model: nn.Module | None = None
) -> tuple[TargetOptions, torch.device | None]:
    """Return the target's options for a device, and the device to which the model is copied; None: it stays.

    A model that runs itself runs on the device. A model from which a program is emitted is captured and checked on the
    CPU, so that torch's own build does not matter.

    Args:
        device: the requested device; None: the model's.
        model: the model; None if there is only a stored program.

    Raises:
        OptionError: torch or the target does not run on the device.
        Unavailable: the machine lacks a requirement of the target there.
    """
    if not backend.emits:
        check_device(device)
        return options, device
    tensors = () if model is None else itertools.chain(model.parameters(), model.buffers())
    own = next((tensor.device for tensor in tensors if tensor.device.type not in {"cpu", "meta"}), _CPU)
    if own.type == "cpu":
        return backend.place_options(options, device), None
    return backend.place_options(options, device or own), _CPU


def check_device(device: torch.device | None) -> None:
    """Raise ``OptionError`` if torch cannot use a device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _unusable_device(device, error) from error


def _unusable_device(device: object, error: Exception) -> OptionError:
    reason = str(error).strip().partition("\n")[0]
    return OptionError(f"device={str(device)!r} cannot be used here: {reason}", nearest="cpu", next_step=_DEVICE_ADVICE)
