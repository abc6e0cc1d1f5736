"""The requirements of a plan, and the errors that name a missing requirement."""

import contextlib
import mmap
from collections.abc import Iterator, Sequence

import torch

from lorac.backends.tensorrt.library import (
    NVIDIA,
    RTX,
    TensorRTLibrary,
    collect_errors,
    find_library,
    known_capabilities,
)
from lorac.errors import ArtifactError, MissingExtra, Unavailable, warn

_SAVE_ADVICE = "compiled.save(folder) writes what lorac.load runs on a machine with an NVIDIA GPU"
_CPU_ADVICE = f"{_SAVE_ADVICE}; target='onnxruntime' and target='eager' run on the CPU"


def missing_requirement() -> str | None:
    """Return the reason, in one line, why plans cannot run on this machine; None if they can."""
    if torch.version.cuda is None:
        return f"a plan of TensorRT runs on a GPU by CUDA, and torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"a plan of TensorRT runs on a GPU, and torch {torch.__version__} finds none: no driver, or no GPU"
    return None


def check_requirements() -> None:
    """Check that plans can run on this machine.

    Raises:
        Unavailable: torch was built without CUDA, or finds no driver or GPU.
    """
    why = missing_requirement()
    if why is not None:
        raise Unavailable(why, next_step=_CPU_ADVICE)


def warn_missing_requirement() -> None:
    """Warn if plans cannot run on this machine."""
    why = missing_requirement()
    if why is not None:
        warn(f"the program is built and cannot run here: {why}", next_step=_SAVE_ADVICE)


def resolve_cuda_device(device: str | torch.device) -> torch.device:
    """Return a device of this machine with its index.

    Raises:
        Unavailable: the device is not a GPU, or its index is too high for this machine.
    """
    wanted = torch.device(device)
    if wanted.type != "cuda":
        raise Unavailable(f"a plan of TensorRT runs on a GPU, not on '{wanted}'", next_step="give device='cuda'")
    check_requirements()
    index = torch.cuda.current_device() if wanted.index is None else wanted.index
    if index >= torch.cuda.device_count():
        raise Unavailable(
            f"there is no device '{wanted}'", nearest=f"cuda:{torch.cuda.device_count() - 1}", next_step=_CPU_ADVICE
        )
    return torch.device("cuda", index)


def plan_device(device: str | torch.device | None) -> torch.device:
    """Return the device of a program's plans, with its index; the CPU on a machine without a GPU.

    Args:
        device: the option; None: the current GPU.

    Raises:
        Unavailable: the device is not a GPU, or its index is too high for this machine.
    """
    wanted = torch.device("cuda" if device is None else device)
    return (
        torch.device("cpu")
        if wanted.type == "cuda" and missing_requirement() is not None
        else resolve_cuda_device(wanted)
    )


@contextlib.contextmanager
def current_device(device: str | torch.device | None) -> Iterator[None]:
    """Make the device of a program's plans torch's current device inside the block; do nothing without a GPU.

    Raises:
        Unavailable: the device is not a GPU, or its index is too high for this machine.
    """
    place = plan_device(device)
    with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
        yield


def check_capability(found: str, built_for: Sequence[str], gpu: str, library: TensorRTLibrary) -> None:
    """Check that a plan was built for a GPU's compute capability.

    Args:
        found: the GPU's compute capability.
        built_for: the capabilities of the plan; empty if unknown.
        library: the library that built the plan.

    Raises:
        Unavailable: the plan was built for other capabilities.
    """
    if not built_for or found in built_for:
        return
    known = known_capabilities(library)
    raise Unavailable(
        f"{gpu} has compute capability {found}, and the plan was built for {', '.join(built_for)}",
        next_step=f"compile from the model with target_capabilities={[*built_for, found]}"
        if found in known
        else f"{library.name_and_version} builds for {', '.join(known) or 'the GPU that is here'}; "
        "target='onnxruntime' and device='cuda' take any GPU",
    )


def find_maker(made_by: str) -> TensorRTLibrary:
    """Return the library that built a plan.

    Args:
        made_by: the library's name and version.

    Raises:
        ArtifactError: this machine has another version of the library, or does not have it.
    """
    name, _, version = made_by.partition(" ")
    try:
        library = find_library(name if name in (NVIDIA, RTX) else None)
    except MissingExtra:
        library = find_library()
    if library.name_and_version != made_by:
        raise ArtifactError(
            f"the plan was made by {made_by}, and {library.name_and_version} is installed: a plan runs only in its "
            "own version",
            next_step=f"pip install {name}=={version}, or compile again from the model",
        )
    return library


def check_plan(plan: bytes | memoryview | mmap.mmap, library: TensorRTLibrary) -> None:
    """Check that bytes are a plan, as far as the library can tell from the header.

    Raises:
        ArtifactError: they are not a plan.
    """
    if not library.is_rtx:
        return  # TensorRT itself reports it only when it loads the plan
    trt = library.module
    with collect_errors() as messages:
        _, found = trt.Runtime(library.logger).get_engine_validity(plan)
        messages.why()  # a missing driver or GPU has errors of its own
    if found & int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE):
        raise ArtifactError(f"these {len(plan)} bytes are not a plan of {library.name_and_version}")
