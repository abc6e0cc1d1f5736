"""Compute capabilities: which GPUs a plan is built for, which the library knows, and which one is here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorac.backends.tensorrt import library
from lorac.errors import OptionError, nearest_name, short

_MARK = "SM"


def local_capability() -> str | None:
    """The compute capability of this machine's GPU, such as ``"8.9"``; None where there is none that torch can use."""
    return capability_of(torch.device("cuda")) if torch.cuda.is_available() else None


def capability_of(device: torch.device) -> str:
    """The compute capability of a GPU, as ``"8.9"``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def known_capabilities() -> tuple[str, ...]:
    """The capabilities that the library builds for by name; empty where it builds for the GPU that is here alone."""
    if not library.is_rtx():
        return ()
    numbers = (name.removeprefix(_MARK) for name in library.trt().ComputeCapability.__members__)
    return tuple(f"{number[:-1]}.{number[-1]}" for number in numbers if number.isdecimal())


def check_capabilities(wanted: Sequence[str]) -> None:
    """Refuse capabilities that the library does not know.

    Raises:
        OptionError: with the list of those that it knows.
    """
    listed = known_capabilities()
    strange = [name for name in wanted if name not in listed]
    if not strange:
        return
    if not listed:
        raise OptionError(
            f"{library.name_and_version()} takes no target_capabilities: it builds for the GPU that is here",
            next_step="leave target_capabilities= out, or pip install 'lorac[tensorrt]' without NVIDIA's tensorrt",
        )
    raise OptionError(
        f"{library.name_and_version()} builds for no compute capability {short(strange[0])}",
        nearest=nearest_name(strange[0], listed),
        next_step=f"it knows {', '.join(listed)}",
    )


def choose_capabilities(wanted: Sequence[str]) -> tuple[str, ...]:
    """The capabilities to build for: those asked for, else the local GPU's; empty: the library's own default."""
    if wanted:
        return tuple(wanted)
    here = local_capability()
    return (here,) if here is not None and here in known_capabilities() else ()


def capability_member(capability: str) -> object:
    """The library's own name for a capability."""
    return library.trt().ComputeCapability.__members__[_MARK + capability.replace(".", "")]
