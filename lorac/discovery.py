"""What registers itself by existing: the modules of a folder, and what other packages offer by entry points."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from types import ModuleType


def list_modules(package: ModuleType) -> list[str]:
    """Names of a package's modules and packages, sorted, those that begin with an underscore left out."""
    return sorted(found.name for found in pkgutil.iter_modules(package.__path__) if not found.name.startswith("_"))


def import_modules(package: ModuleType) -> Iterator[ModuleType]:
    """The modules of a package, imported, in order of their names."""
    for name in list_modules(package):
        yield importlib.import_module(f"{package.__name__}.{name}")


def list_entry_points(group: str) -> Mapping[str, metadata.EntryPoint]:
    """What installed packages offer under an entry-point group, by name; nothing is imported."""
    return {found.name: found for found in metadata.entry_points(group=group)}
