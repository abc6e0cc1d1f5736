"""Pickled tensors: the names and sizes in a `.bin` file are checked before anything is unpickled.

torch.save writes a zip file that is not compressed: `<name>/data.pkl`, a pickle, and every storage as a file next to
it. `torch.load(weights_only=True)` runs no code; but a few bytes of a pickle can ask it for tensors of any size, and a
few bytes of a zip file can unpack to any length. So sizes are added up first, and a pickle may name only the functions
that a dictionary of dense tensors needs.
"""

import codecs
import itertools
import os
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from lorac.errors import FormatError, LoracError
from lorac.limits import check_time, claim_memory, pause_clock

Refuse = Callable[[str], FormatError]
"""(fault) -> the error to raise."""
MOST_STEPS = 1_000_000
"""The most steps of a pickle: 30 for each of 30 000 tensors, which torch unpickles in under two seconds."""
_PICKLE = "data.pkl"
_NAMES = frozenset({"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"})
"""The names in a pickle of named tensors, apart from the types of storages."""
_ARRAYS = frozenset({"numpy ndarray", "numpy dtype", "_codecs encode"})
_RECONSTRUCT = tuple(f"numpy.{core}.multiarray" for core in ("core", "_core"))
"""The names in a pickle of NumPy's arrays, and the modules of the function that makes them."""
_PEEKED = 1 << 24
"""The most bytes of a pickle that ``peek_names`` reads."""
_TEXTS = frozenset({"BINUNICODE", "SHORT_BINUNICODE", "UNICODE"})
"""Steps of a pickle that make a text."""
_PER_MEMBER = 1024
"""The most bytes that Python allocates for each file in a zip file."""
_END, _END_64 = 22, 76
"""Length of the last record of a zip file, and of the long form before it with its locator."""


def load_pickle(path: Path, refuse: Refuse, *, arrays: bool = False) -> object:
    """Return the content of a `.bin` file.

    Args:
        path: the file.
        refuse: makes the error.
        arrays: whether NumPy's integer arrays are allowed too.

    Raises:
        FormatError: made by ``refuse``, if the file is not of this kind, or names a function that a dictionary of
            tensors does not need; or the unpacked file is too large, or has too many members.
    """
    names = _NAMES | _ARRAYS | {f"{module} _reconstruct" for module in _RECONSTRUCT} if arrays else _NAMES
    check_archive(path, refuse, lambda archive: _check_names(archive, refuse, names))
    try:
        with pause_clock(), torch.serialization.safe_globals(_list_array_types() if arrays else []):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler may raise any error for damaged bytes
        reason = str(error).strip().partition("\n")[0]
        raise refuse(f"torch.load(weights_only=True) refuses it: {reason}") from error


def _list_array_types() -> list[Any]:
    """Return the types and functions by which NumPy's arrays of whole numbers are unpickled."""
    reconstruct: Any = np.zeros(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in ("int16", "int32", "int64")}
    return [
        np.ndarray,
        np.dtype,
        *kinds,
        codecs.encode,
        *((reconstruct, f"{m}._reconstruct") for m in _RECONSTRUCT),
    ]


def peek_names(path: Path) -> frozenset[str]:
    """Return the short texts in a `.bin` file's pickle, including the tensors' names; empty for other files."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.rpartition("/")[2] == _PICKLE]
            if len(members) != 1 or members[0].file_size > _PEEKED:
                return frozenset()
            steps = itertools.islice(pickletools.genops(archive.read(members[0])), MOST_STEPS)
        return frozenset(str(argument) for opcode, argument, _ in steps if opcode.name in _TEXTS)
    except Exception:  # readers of zip files and of pickles may raise any error for damaged bytes
        return frozenset()


def check_archive(path: Path, refuse: Refuse, check: Callable[[zipfile.ZipFile], None] = lambda _: None) -> None:
    """Check that an archive of torch.save unpacks to no more bytes than a file may take.

    Args:
        path: the file.
        refuse: makes the error.
        check: a further check of the archive.

    Raises:
        FormatError: made by ``refuse``, if torch.save did not write the file; or the file would take too much memory.
    """
    try:
        with path.open("rb") as file:
            claim_memory(_count_members(file) * _PER_MEMBER, "its directory")
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive, path.stat().st_size, refuse)
            check(archive)
    except (LoracError, OSError):
        raise
    except Exception as error:  # readers of zip files and of pickles may raise any error for damaged bytes
        raise refuse(f"torch.load(weights_only=True) refuses it: torch.save did not write it ({error})") from error


def _count_members(file: BinaryIO) -> int:
    """Return the number of members that the end of a zip file states, before anything is allocated for each."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - (1 << 16) - _END))
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise zipfile.BadZipFile("it does not end as a zip file does")
    count = int.from_bytes(tail[at + 10 : at + 12], "little")
    long = tail[max(0, at - _END_64) : at]
    return int.from_bytes(long[32:40], "little") if long.startswith(b"PK\6\6") else count


def _check_sizes(archive: zipfile.ZipFile, size: int, refuse: Refuse) -> None:
    """Refuse two members of the same name, and members that unpack to much more than the size of the file."""
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
        raise refuse("two of its members have one name")
    claim_memory(sum(member.file_size for member in members) - size, "it is packed")


def _check_names(archive: zipfile.ZipFile, refuse: Refuse, names: frozenset[str]) -> None:
    """Refuse a pickle that names anything but types of storages and the members of ``names``."""
    found = [name for name in archive.namelist() if name.rpartition("/")[2] == _PICKLE]
    if len(found) != 1:
        raise refuse(f"torch.load(weights_only=True) refuses it: it has {len(found)} members called {_PICKLE}, not one")
    for step, (opcode, argument, _) in enumerate(pickletools.genops(archive.read(found[0]))):
        check_time(step)
        if step == MOST_STEPS:
            raise refuse(f"its pickle takes more than {MOST_STEPS} steps")
        if opcode.name not in {"GLOBAL", "STACK_GLOBAL", "INST"}:
            continue
        module, _, kind = str(argument).partition(" ")
        is_storage = module == "torch" and kind.endswith("Storage") and kind.isidentifier()
        if argument not in names and not is_storage:
            raise refuse(
                f"torch.load(weights_only=True) is not called: it names {argument!r}, and dense tensors need none"
            )
