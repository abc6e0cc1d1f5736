"""Adapters on disk.

Every module here that does not begin with an underscore is a format, found by its existence.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import cast

from torch import nn

from lorac.argument_types import check_type
from lorac.discovery import import_modules
from lorac.errors import FormatError, nearest_name
from lorac.formats._files import read_header
from lorac.formats._format import Format
from lorac.limits import charge_reading
from lorac.storage.atomic_folders import MANIFEST, read_consistently, replace_atomically
from lorac.storage.os_errors import translate_os_errors
from lorac.variants.adapter import Adapter

__all__ = ["Format", "formats", "load_adapter", "save_adapter"]


@functools.cache
def formats() -> dict[str, Format]:
    """Every format by name."""
    found = (cast(Format, module.FORMAT) for module in import_modules(sys.modules[__name__]))
    return {format.name: format for format in found}


def load_adapter(path: str | os.PathLike[str], model: nn.Module | None = None, name: str | None = None) -> Adapter:
    """Read an adapter, whatever its format.

    Every tensor is used or accounted for by a rule of the format, every configuration field known.
    With the model also every site, shape and recorded base hash is checked. What the file may cost
    beyond its size is bounded; `lorac.budget` sets how.

    Args:
        path: A PEFT folder, a file of lorac's own, or any other format of `formats()`.
        model: The base it is meant for, or a copy of it; only read.
        name: The adapter's name; by default the folder's, or the one the file records.

    Returns:
        The adapter. Its tensors have the file's dtype, matrices the shape (out, in).

    Raises:
        FormatError: FormatError,
            FormatError.
        AdapterError: AdapterError.
        SiteError: SiteError.
    """
    check_type(path, (str, os.PathLike), "what lorac.load_adapter reads", next_step="give the path of a file or folder")
    path = Path(path)
    with translate_os_errors(path, FormatError, "read", "unreadable"):
        return read_consistently(path, lambda: _load(path, model, name))


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    format: str = "peft",
    model: nn.Module | None = None,
) -> None:
    """Write an adapter; equal input gives equal bytes.

    It is written aside and takes its place in one step: whatever goes wrong, what was there before
    stays whole. A folder that exists already keeps the files that are not the adapter's.

    Args:
        adapter: What to write.
        path: The folder ("peft") or file ("native").
        format: One of `formats()`.
        model: The base; its hash is recorded with the adapter. Needed where the format lays out
            convolutions or embeddings in their own way and the adapter does not come from a file.

    Raises:
        FormatError: There is no such format, or it cannot be written.
        FormatError: The format has no place for what the adapter is.
        BaseNeeded: The format needs the model.
        FormatError: The disk is full, the place forbidden, or otherwise the system's reason.
        WrongType: It is no adapter.
        AdapterError, SiteError: The adapter does not fit the model.
    """
    check_type(adapter, Adapter, "what lorac.save_adapter writes", next_step="give one of compiled.adapters.values()")
    writers = {name: found for name, found in formats().items() if found.save is not None}
    if format not in writers:
        raise FormatError(
            f"adapters cannot be saved in the format '{format}'",
            nearest=nearest_name(format, writers),
            next_step=f"formats to save in: {', '.join(writers)}",
            code="unknown_format",
        )
    save = writers[format].save
    assert save is not None
    target = Path(path)
    with translate_os_errors(target, FormatError, "written", "unreadable"), replace_atomically(target) as staged:
        save(adapter, staged, model, target)
        if target.is_file() if staged.is_dir() else target.is_dir():
            kind = "a file" if staged.is_dir() else "a folder"
            raise FormatError(
                f"'{target}' is {kind}, which the format '{format}' does not write", next_step="give another path"
            )


def _load(path: Path, model: nn.Module | None, name: str | None) -> Adapter:
    with charge_reading(path):
        return _format_of(path).load(path, model, name)


def _format_of(path: Path) -> Format:
    if not path.exists():
        raise FormatError(
            f"there is no adapter at '{path}'",
            nearest=_nearest_sibling(path),
            next_step="give the path of a file or folder",
            code="unknown_format",
        )
    matching = [format for format in formats().values() if format.recognises(path)]
    if len(matching) == 1:
        return matching[0]
    if path.is_file() and path.suffix == ".safetensors":
        read_header(path)  # a damaged file is told as such
    raise FormatError(
        f"'{path}' is an adapter of no known format; looked for "
        + "; ".join(f"{format.name}: {format.looks_for}" for format in formats().values()),
        next_step=_suggest_path(path),
        code="unknown_format",
    )


def _nearest_sibling(path: Path) -> str | None:
    if not path.parent.is_dir():
        return None
    return nearest_name(path.name, [found.name for found in path.parent.iterdir()])


def _suggest_path(path: Path) -> str:
    """What somebody may have meant who gave a path that is no adapter's."""
    if path.name == MANIFEST or (path / MANIFEST).is_file():
        return "it is a compiled model: lorac.load(folder) runs it, with its adapters in it"
    # PEFT puts an adapter that is not named 'default' into a folder of its own.
    inside = sorted(path.iterdir()) if path.is_dir() else []
    found = [p for p in inside if any(format.recognises(p) for format in formats().values())]
    if found:
        return f"did you mean {', '.join(repr(str(p)) for p in found[:3])}?"
    if (path / "config.json").is_file():
        return "it is a model: give the folder that PEFT wrote of the adapter, or a file of lorac's own"
    return "give the folder that PEFT wrote, or a file of lorac's own"
