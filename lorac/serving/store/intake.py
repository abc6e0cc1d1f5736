"""Intake of an upload: its files' names are checked, and each file is opened once and copied before it is parsed."""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from lorac.errors import FormatError, list_some, short
from lorac.formats.peft.writer import CONFIG, WEIGHTS
from lorac.serving.store.quotas import QuotaClaim
from lorac.storage.open_file import open_handle
from lorac.storage.paths import find_inner_path

NATIVE = "adapter.safetensors"
"""The name under which an upload in lorac's own format is stored, whatever the client called it."""
_ENDING = ".safetensors"
_CHUNK = 1 << 20


def name_files(names: list[str]) -> list[str]:
    """Return the names under which the files of an upload are stored.

    Raises:
        FormatError: the names do not match a format that may be uploaded.
    """
    if sorted(names) == [CONFIG, WEIGHTS]:
        return names
    if len(names) == 1 and names[0].endswith(_ENDING) and names[0] != WEIGHTS:
        return [NATIVE]
    raise FormatError(
        f"the files {list_some([short(name) for name in names], quote='')} are not an adapter that this server takes",
        next_step=f"send {CONFIG} and {WEIGHTS} as PEFT writes them, or one file (*{_ENDING}) of "
        "lorac.save_adapter(format='native')",
        code="unknown_format",
    )


def copy_files(files: Mapping[str, BinaryIO], folder: Path, claim: QuotaClaim) -> int:
    """Copy the files of an upload into a folder, and return their size.

    Args:
        files: the files by the client's names, which never become paths.
        folder: an empty folder of the server's.
        claim: takes quota for every byte before it is written, whatever size was announced.

    Raises:
        FormatError: as ``name_files``.
        OverBudget: the tenant has no quota for the bytes.
    """
    names = name_files([*files])
    return sum(_copy(source, folder / name, claim) for source, name in zip(files.values(), names, strict=True))


def _copy(source: BinaryIO, path: Path, claim: QuotaClaim) -> int:
    size = 0
    with path.open("xb") as target:
        while chunk := source.read(_CHUNK):
            claim.take(nbytes=len(chunk))
            size += target.write(chunk)
    return size


@contextlib.contextmanager
def open_files(folder: Path, path: str) -> Iterator[dict[str, BinaryIO]]:
    """Open the adapter at a path within a folder: a file, or the files of a PEFT folder.

    Each part of the path is opened relative to the open folder above it, and no link is followed, so that folders that
    are moved meanwhile cannot lead elsewhere. On Windows, which lacks such calls, a folder that becomes a link
    meanwhile is followed.

    Args:
        path: the path relative to the folder, with slashes.

    Raises:
        FormatError: the path leads out of the folder, or to something that is no file.
    """
    with contextlib.ExitStack() as stack:
        try:
            files = _open_parts(folder, path, stack)
        except OSError as error:
            raise _unreadable(path, f"cannot be read: {error.strerror}") from error
        yield files


def _open_parts(folder: Path, path: object, stack: contextlib.ExitStack) -> dict[str, BinaryIO]:
    if not isinstance(path, str) or find_inner_path(folder, path) is None:
        raise _unreadable(path, "is not a path inside the store")
    if sys.platform == "win32":  # Windows opens neither folders nor files relative to an open folder
        files = [f"{path}/{name}" for name in (CONFIG, WEIGHTS)] if (folder / path).is_dir() else [path]
        found = {file.rpartition("/")[2]: _open_handle(os.fspath(folder / file), None, stack) for file in files}
    else:
        handle = _open_handle(os.fspath(folder), None, stack)
        for part in path.split("/"):
            handle = _open_handle(part, handle, stack)
        found = {path.rpartition("/")[2]: handle}
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            found = {name: _open_handle(name, handle, stack) for name in (CONFIG, WEIGHTS)}
    if not all(stat.S_ISREG(os.fstat(file).st_mode) for file in found.values()):
        raise _unreadable(path, "is not a file")
    return {name: stack.enter_context(os.fdopen(os.dup(file), "rb")) for name, file in found.items()}


def _open_handle(name: str, within: int | None, stack: contextlib.ExitStack) -> int:
    handle = open_handle(name, within=within)
    stack.callback(os.close, handle)
    return handle


def _unreadable(path: object, what: str) -> FormatError:
    return FormatError(
        f"{short(path)} {what}",
        next_step="give the path of an adapter below the tenant's folder in the store's 'incoming'",
        code="unreadable",
    )
