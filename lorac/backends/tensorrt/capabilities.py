"""Compute capabilities: those that a plan is built for, that the library knows, and this machine's."""

from collections.abc import Sequence

import torch

from lorac.backends.tensorrt.library import RTX, TensorRTLibrary
from lorac.errors import OptionError, not_one_of

_MARK = "SM"


def local_capability() -> str | None:
    """Return the compute capability of torch's current GPU, such as ``"8.9"``; None where torch can use none."""
    return capability_of(torch.device("cuda")) if torch.cuda.is_available() else None


def capability_of(device: torch.device) -> str:
    """Return the compute capability of a GPU, such as ``"8.9"``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def known_capabilities(library: TensorRTLibrary) -> tuple[str, ...]:
    """List the capabilities that a library builds for; empty if it builds only for a GPU of this machine."""
    if not library.is_rtx:
        return ()
    numbers = (name.removeprefix(_MARK) for name in library.module.ComputeCapability.__members__)
    return tuple(f"{number[:-1]}.{number[-1]}" for number in numbers if number.isdecimal())


def check_capabilities(wanted: Sequence[str], library: TensorRTLibrary) -> None:
    """Check that a library knows capabilities.

    Raises:
        OptionError: with the list of the known ones.
    """
    listed = known_capabilities(library)
    strange = [name for name in wanted if name not in listed]
    if not strange:
        return
    if not listed:
        raise OptionError(
            f"{library.name_and_version} takes no target_capabilities: it builds for the GPU that is here",
            next_step=f"leave target_capabilities= out, or give library='{RTX}'",
        )
    raise not_one_of(f"{library.name_and_version} builds for no compute capability", strange[0], listed)


def choose_capabilities(wanted: Sequence[str], library: TensorRTLibrary) -> tuple[str, ...]:
    """Return the requested capabilities, else the current GPU's; empty: the library's default."""
    if wanted:
        return tuple(wanted)
    here = local_capability()
    return (here,) if here is not None and here in known_capabilities(library) else ()


def capability_member(library: TensorRTLibrary, capability: str) -> object:
    """Return the library's own name for a capability."""
    return library.module.ComputeCapability.__members__[_MARK + capability.replace(".", "")]
