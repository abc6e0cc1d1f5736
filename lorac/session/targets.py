"""The targets: packages of ``lorac.backends`` with a module ``backend``, and targets of other packages.

Another package offers a target by an entry point of the group ``lorac.backends``: the target's name, and
``module:object`` of its ``lorac.target.backend.Backend``.
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Mapping
from pathlib import Path

from lorac import backends
from lorac.discovery import list_entry_points, list_modules
from lorac.errors import EXTRAS, MissingExtra, OptionError, not_one_of
from lorac.target.backend import Backend, TargetOptions

GROUP = "lorac.backends"
_ATTRIBUTE = "BACKEND"
_MEANT = dict.fromkeys(("quantize", "quantization", "load_in_4bit", "load_in_8bit"), "weights")
"""Names of other libraries -> lorac's option."""


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
        if target.partition(":")[0] in {"cpu", "cuda", "gpu"}:
            step = "name both: target='onnxruntime', device='cuda'; target='eager' runs on the model's own device"
            raise OptionError(f"'{target}' is a device, not a target", next_step=step)
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


def parse_options(target: str, backend: Backend[TargetOptions], options: Mapping[str, object]) -> TargetOptions:
    """Parse those keyword arguments of ``compile`` that are options of a target, whose backend is given.

    Raises:
        OptionError: the target has no such option; the message names another target that has it.
    """
    own = {spec.name for spec in dataclasses.fields(backend.options)}
    for name in options.keys() - own:
        meant = _MEANT.get(name, name)
        others = (other for other in _built_in_targets() if meant in _names(other))
        found = target if meant in own else next(others, None)
        if found is not None:
            step = f"give {meant}=" if found == target else f"leave it out, or compile with target='{found}'"
            nearest = None if meant == name else meant
            raise OptionError(f"target '{target}' has no option '{name}'", nearest=nearest, next_step=step)
    return backend.parse_options(options)


def _names(target: str) -> set[str]:
    """Return the names of a target's options; none where its library is not installed."""
    with contextlib.suppress(MissingExtra):
        return {spec.name for spec in dataclasses.fields(find_backend(target).options)}
    return set()


@functools.cache
def _built_in_targets() -> list[str]:
    """Return the packages of ``lorac.backends`` with a module ``backend``, without importing them."""
    folders = [Path(folder) for folder in backends.__path__]
    return [name for name in list_modules(backends) if any((path / name / "backend.py").exists() for path in folders)]
