"""Compute capabilities: which GPUs a plan is built for, which the library knows, and whether one is here."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorac.backends.tensorrt import library
from lorac.errors import Unavailable, UnknownOption, nearest_name, short, warn

_MARK, _CUDA = "SM", "cuda"


def local() -> str | None:
    """The compute capability of this machine's GPU, such as ``"8.9"``; None where there is none that torch can use."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def known() -> tuple[str, ...]:
    """The capabilities that the library builds for by name; empty where it builds for the GPU that is here alone."""
    if not library.is_rtx():
        return ()
    numbers = (name.removeprefix(_MARK) for name in library.trt().ComputeCapability.__members__)
    return tuple(f"{number[:-1]}.{number[-1]}" for number in numbers if number.isdecimal())


def refuse_unknown(wanted: Sequence[str]) -> None:
    """Refuse capabilities that the library does not know.

    Raises:
        UnknownOption: with the list of those that it knows.
    """
    listed = known()
    strange = [name for name in wanted if name not in listed]
    if not strange:
        return
    if not listed:
        raise UnknownOption(
            f"{_told()} takes no target_capabilities: it builds for the GPU that is here",
            next_step="leave target_capabilities= out, or pip install 'lorac[tensorrt]' without NVIDIA's tensorrt",
        )
    raise UnknownOption(
        f"{_told()} builds for no compute capability {short(strange[0])}",
        nearest=nearest_name(strange[0], listed),
        next_step=f"it knows {', '.join(listed)}",
    )


def chosen(wanted: Sequence[str]) -> tuple[str, ...]:
    """The capabilities to build for: those asked for, else the local GPU's; empty: the library's own default."""
    if wanted:
        return tuple(wanted)
    here = local()
    return (here,) if here is not None and here in known() else ()


def member(capability: str) -> object:
    """The library's own name for a capability."""
    return library.trt().ComputeCapability.__members__[_MARK + capability.replace(".", "")]


def lacking() -> str | None:
    """Why an engine cannot run here, in a sentence; None where it can."""
    return None if local() is not None else "there is no NVIDIA GPU here that torch can use: the engine cannot run here"


def tell_lacking() -> None:
    """Warn where an engine cannot run."""
    why = lacking()
    if why is not None:
        warn(why, next_step="save it and load it on a machine with one; compiled.explain() says it too")


def device_of(asked: str | torch.device | None = None) -> torch.device:
    """Where plans run: a GPU, or the CPU's memory as long as there is none.

    Args:
        asked: what ``lorac.load`` was given.

    Raises:
        Unavailable: another device than a GPU was asked for.
    """
    wanted = None if asked is None else torch.device(asked)
    if wanted is not None and wanted.type != _CUDA:
        raise Unavailable(
            f"plans of tensorrt run on NVIDIA GPUs, and not on device '{wanted}'",
            next_step="leave device= out, or give device='cuda'; target='onnxruntime' runs on the CPU",
        )
    if local() is None:
        return torch.device("cpu")
    return torch.device(_CUDA, torch.cuda.current_device()) if wanted is None or wanted.index is None else wanted


def refuse_lacking() -> None:
    """Refuse to run where there is no GPU.

    Raises:
        Unavailable: saying what can be done instead.
    """
    why = lacking()
    if why is not None:
        raise Unavailable(
            why,
            next_step="compiled.save(folder) writes what lorac.load runs on a machine with one; target='onnxruntime' "
            "and target='eager' run on the CPU",
        )


def _told() -> str:
    return f"{library.trt().__name__} {library.version()}"
