"""What a file format is: a name, a way to recognise its files, and how to read and write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lorac.variants.adapter import Adapter


@dataclass(frozen=True)
class Format:
    """One way of keeping an adapter on disk.

    A module of `lorac.formats` that defines `FORMAT` is a format; nothing else registers it.

    Attributes:
        name: What `save_adapter(format=)` calls it.
        looks_for: What `recognises` looks at, as a phrase for error messages.
        recognises: Whether a path, which exists, is of this format. Cheap, exclusive among the
            formats, and never raises on a damaged file.
        load: (path, model or None, name or None) -> the adapter, strictly checked.
        save: (adapter, path, model or None, target) writes a file, or a folder, at a path that does not
            exist yet, and which is moved to the target; None where a format is read only.
    """

    name: str
    looks_for: str
    recognises: Callable[[Path], bool]
    load: Callable[[Path, nn.Module | None, str | None], Adapter]
    save: Callable[[Adapter, Path, nn.Module | None, Path], None] | None = None
