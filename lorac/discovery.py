"""Discovery without registration: the modules of a package, and the entry points of other packages."""

import functools
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


def list_modules(package: ModuleType) -> list[str]:
    """Return the names of a package's public modules, sorted."""
    return sorted(found.name for found in pkgutil.iter_modules(package.__path__) if not found.name.startswith("_"))


def import_modules(package: ModuleType) -> Iterator[ModuleType]:
    """Import the public modules of a package, in order of their names."""
    for name in list_modules(package):
        yield importlib.import_module(f"{package.__name__}.{name}")


def find_classes(package: ModuleType, base: type[T]) -> list[type[T]]:
    """Return the concrete subclasses of a class in the public modules of a package, in order of the modules' names."""
    found = [value for module in import_modules(package) for value in vars(module).values() if inspect.isclass(value)]
    return list(dict.fromkeys(cls for cls in found if issubclass(cls, base) and not inspect.isabstract(cls)))


def list_entry_points(group: str) -> Mapping[str, metadata.EntryPoint]:
    """Return the entry points of a group by name, without importing them."""
    changes = []
    for folder in sys.path:
        try:
            changes.append((folder, os.stat(folder or ".").st_mtime_ns))  # changes when a package comes or goes
        except OSError:
            changes.append((folder, 0))
    return _read_entry_points(group, tuple(changes))


@functools.lru_cache(maxsize=8)
def _read_entry_points(group: str, folders: tuple[tuple[str, int], ...]) -> Mapping[str, metadata.EntryPoint]:
    """Return a group's entry points by name; cached while ``folders``, the import path, have not changed."""
    return {found.name: found for found in metadata.entry_points(group=group)}
