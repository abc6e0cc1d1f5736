"""The targets: packages of ``lorac.backends`` with a module ``backend``, and targets of other packages.

Another package offers a target by an entry point of the group ``lorac.backends``: the target's name, and
``module:object`` of its ``lorac.target.backend.Backend``.
"""

import functools
import importlib
from pathlib import Path

from lorac import backends
from lorac.discovery import list_entry_points, list_modules
from lorac.errors import EXTRAS, MissingExtra, not_one_of
from lorac.target.backend import Backend, TargetOptions

GROUP = "lorac.backends"
_ATTRIBUTE = "BACKEND"


def targets() -> tuple[str, ...]:
    """Return the names of all targets, sorted, without importing any."""
    return tuple(sorted({*_built_in_targets(), *list_entry_points(GROUP)}))


def find_backend(target: str) -> Backend[TargetOptions]:
    """Return the backend of a target.

    Raises:
        OptionError: there is no such target.
        MissingExtra: a library that it needs is not installed.
    """
    known = targets()
    if target not in known:
        raise not_one_of("there is no target", target, known)
    try:
        backend: Backend[TargetOptions]
        if target in _built_in_targets():
            backend = getattr(importlib.import_module(f"{GROUP}.{target}.backend"), _ATTRIBUTE)
        else:
            backend = list_entry_points(GROUP)[target].load()
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or target, target if target in EXTRAS.values() else None) from error
    return backend


@functools.cache
def _built_in_targets() -> list[str]:
    """Return the packages of ``lorac.backends`` with a module ``backend``, without importing them."""
    folders = [Path(folder) for folder in backends.__path__]
    return [name for name in list_modules(backends) if any((path / name / "backend.py").exists() for path in folders)]
