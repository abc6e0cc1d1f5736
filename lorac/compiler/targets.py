"""The targets there are: packages of ``lorac.backends`` with a module ``backend``, and what others offer.

A package of one's own offers a target by an entry point of the group ``lorac.backends``: the target's name, and
``module:object`` of its ``lorac.ir.engine.Backend``.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from pathlib import Path

from lorac import backends
from lorac.discovery import module_names, offered
from lorac.errors import MissingExtra, not_one_of
from lorac.ir.engine import Backend, TargetOptions

GROUP = "lorac.backends"
_OBJECT = "BACKEND"


def targets() -> tuple[str, ...]:
    """Names of all targets, sorted; nothing is imported."""
    return tuple(sorted({*_own(), *offered(GROUP)}))


def backend_of(target: str) -> Backend[TargetOptions]:
    """The backend of a target.

    Raises:
        OptionError: there is no such target.
        MissingExtra: a library it needs is not installed.
    """
    known = targets()
    if target not in known:
        raise not_one_of("there is no target", target, known)
    try:
        return _loaded(target)
    except ModuleNotFoundError as error:
        raise MissingExtra(error.name or target, target if target in _extras() else None) from error


def _own() -> list[str]:
    """Names of lorac's own backends: packages with a module ``backend``, told without importing them."""
    homes = [Path(home) for home in backends.__path__]
    return [name for name in module_names(backends) if any((home / name / "backend.py").exists() for home in homes)]


def _loaded(target: str) -> Backend[TargetOptions]:
    found: Backend[TargetOptions]
    if target in _own():
        found = getattr(importlib.import_module(f"{GROUP}.{target}.backend"), _OBJECT)
    else:
        found = offered(GROUP)[target].load()
    return found


def _extras() -> list[str]:
    """The optional parts of lorac that pip installs by name."""
    return metadata.metadata("lorac").get_all("Provides-Extra") or []
