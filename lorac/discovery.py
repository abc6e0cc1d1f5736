"""Discovery of things that register by existing: the modules of a package, and entry points of other packages."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from types import ModuleType


def list_modules(package: ModuleType) -> list[str]:
    """Return the names of a package's public modules, sorted."""
    return sorted(found.name for found in pkgutil.iter_modules(package.__path__) if not found.name.startswith("_"))


def import_modules(package: ModuleType) -> Iterator[ModuleType]:
    """Import the public modules of a package, in order of their names."""
    for name in list_modules(package):
        yield importlib.import_module(f"{package.__name__}.{name}")


def list_entry_points(group: str) -> Mapping[str, metadata.EntryPoint]:
    """Return the entry points of a group by name, without importing them."""
    return {found.name: found for found in metadata.entry_points(group=group)}
