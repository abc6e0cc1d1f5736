"""Prepacked weights in files, which sessions of all processes map instead of each making its own copies.

When a session starts, ONNX Runtime lays out constant weights for the processor's kernels, and keeps these copies as
long as the session exists. It can write them, with the optimised model, and read them again. Such files fit one release
of ONNX Runtime and one kind of processor.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from lorac.backends.onnx.model_files import MODEL_FILE, WEIGHTS_FILE
from lorac.errors import ArtifactError, warn
from lorac.progress import step
from lorac.storage.artifact import check_manifest, describe_files, open_checked, read_manifest, write_manifest
from lorac.storage.atomic_folders import MANIFEST, locked_folder, replace_atomically
from lorac.storage.paths import translate_os_errors
from lorac.target.engine import ProgramFiles

_FIELDS: dict[str, type] = {"machine": dict, "files": dict}
_LEAF = "session"
"""The folder of a model's files, in a folder that is named by the model."""
_WRITING = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS_FILE,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}
"""ONNX Runtime's settings for a session that writes its optimised model and its prepacked weights."""


def open_prepacked(folder: Path, key: str, write: Callable[[Path], object]) -> ProgramFiles | None:
    """Open the optimised model and the prepacked weights of a session; write them if they are missing.

    Files that are damaged or from another machine are rewritten with a warning. Of several processes one writes them,
    while the others wait.

    Args:
        folder: the folder that stores them, with those of other models.
        key: a hash of the model and its weights.
        write: a function that starts a session which writes them into a folder (``write_prepacked``).

    Returns:
        The open files; None, with a warning, if they can be neither read nor written.
    """
    place = folder / key / _LEAF
    if (files := _read(place)) is not None:
        return files
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked_folder(folder):
            return _read(place, explain=True) or _write(place, write)
    except (OSError, Fail) as error:
        reason = error.strerror if isinstance(error, OSError) else "ONNX Runtime cannot write its weights there"
        warn(
            f"prepacked='{folder}' is not used: {reason or error}",
            next_step="give a folder that can be written to, on a disk with twice the room of the model's weights",
        )
        return None


def write_prepacked(settings: ort.SessionOptions, folder: Path) -> None:
    """Set a session to write its optimised model and its prepacked weights when it starts."""
    settings.optimized_model_filepath = str(folder / MODEL_FILE)
    for name, value in _WRITING.items():
        settings.add_session_config_entry(name, value)


def keep_optimised(settings: ort.SessionOptions) -> None:
    """Turn off optimisation for a session whose model was optimised before it was written."""
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def _read(place: Path, *, explain: bool = False) -> ProgramFiles | None:
    """Open files and check them; return None if they are missing, damaged or from another machine.

    Args:
        explain: whether to warn of existing files that cannot be used.
    """
    if not place.exists():
        return None
    try:
        with translate_os_errors(place, ArtifactError, "read"):
            return _open_checked(place)
    except ArtifactError as error:
        if explain:
            warn(f"prepacked weights are written anew: {error.what}")
        return None


def _open_checked(place: Path) -> ProgramFiles:
    fields = read_manifest(place / MANIFEST)
    check_manifest(place, fields, _FIELDS)
    if others := [name for name, value in _describe_machine().items() if fields["machine"].get(name) != value]:
        raise ArtifactError(f"'{place}' was written by another {others[0]}")
    return {name: open_checked(place, name, entry) for name, entry in fields["files"].items()}


def _write(place: Path, write: Callable[[Path], object]) -> ProgramFiles:
    step("prepacking weights")
    with replace_atomically(place, lambda _: (MODEL_FILE, WEIGHTS_FILE, MANIFEST)) as staged:
        staged.mkdir()
        write(staged)
        write_manifest(staged / MANIFEST, {"machine": _describe_machine(), "files": describe_files(staged)})
    if sys.platform == "linux":  # the GNU C library keeps freed memory, here about the size of the weights
        with contextlib.suppress(AttributeError):  # other C libraries return it themselves
            ctypes.CDLL(None).malloc_trim(0)
    return _open_checked(place)


@functools.cache
def _describe_machine() -> dict[str, str]:
    """Return the facts that decide the layout of weights: ONNX Runtime's release, the processor's instructions."""
    capabilities = torch.cpu.get_capabilities()
    instructions = sorted(name for name, value in capabilities.items() if value is True)
    return {
        "onnxruntime": f"{ort.__version__} ({ort.get_build_info()})",
        "processor": " ".join([str(capabilities["architecture"]), *instructions]),
    }
