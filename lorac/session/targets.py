"""The targets there are: packages of ``lorac.backends`` with a module ``backend``, and what others offer.

A package of one's own offers a target by an entry point of the group ``lorac.backends``: the target's name, and
``module:object`` of its ``lorac.target.engine.Backend``.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path

from lorac import backends
from lorac.discovery import list_entry_points, list_modules
from lorac.errors import MissingExtra, not_one_of
from lorac.target.backend import Backend, TargetOptions

GROUP = "lorac.backends"
_ATTRIBUTE = "BACKEND"


def targets() -> tuple[str, ...]:
    """Names of all targets, sorted; nothing is imported."""
    return tuple(sorted({*_built_in_targets(), *list_entry_points(GROUP)}))


def find_backend(target: str) -> Backend[TargetOptions]:
    """The backend of a target.

    Raises:
        OptionError: there is no such target.
        MissingExtra: a library it needs is not installed.
    """
    known = targets()
    if target not in known:
        raise not_one_of("there is no target", target, known)
    try:
        return _load_backend(target)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or target, target if target in _declared_extras() else None) from error


def _built_in_targets() -> list[str]:
    """Names of lorac's own backends: packages with a module ``backend``, told without importing them."""
    homes = [Path(home) for home in backends.__path__]
    return [name for name in list_modules(backends) if any((home / name / "backend.py").exists() for home in homes)]


def _load_backend(target: str) -> Backend[TargetOptions]:
    found: Backend[TargetOptions]
    if target in _built_in_targets():
        found = getattr(importlib.import_module(f"{GROUP}.{target}.backend"), _ATTRIBUTE)
    else:
        found = list_entry_points(GROUP)[target].load()
    return found


def _declared_extras() -> list[str]:
    """The optional parts of lorac that pip installs by name."""
    return metadata.metadata("lorac").get_all("Provides-Extra") or []
