"""Models of the zoo: how each is built and called, and which adapter PEFT writes for it."""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from campaigns.zoo import families

Call = Mapping[str, Any]


class Inputs(Protocol):
    """Makes the arguments of one call."""

    def __call__(self, model: nn.Module, batch: int, length: int, seed: int) -> Call:
        """Arguments by name, of so many rows and, where a model takes sequences, of that length."""


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        name: ``<library>/<model>``, unique.
        family: what it is counted under.
        build: the model, random, in eval mode; drawn from the global generator, which the caller seeds.
        inputs: arguments of a call.
        adapter: PEFT's configuration of the adapter; None is LoRA on every layer that PEFT's LoRA adapts.
        shapes: ``dynamic_shapes=`` for ``lorac.compile``; None leaves them to lorac.
        fewer: where the adapter is refused, one on ordinary layers alone is tried as well.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    adapter: Callable[[nn.Module], Any] | None = None
    shapes: Callable[[Call], Mapping[str, Any]] | None = None
    fewer: bool = True


def entries(only: Iterable[str] = (), family: Iterable[str] = ()) -> list[Entry]:
    """All models whose names match one of some patterns and whose families are among those named; none given are all.

    A pattern with a slash is of a whole name, any other of a part of it.

    They come one of each family at a time, in an order that has nothing to do with their names, so that a run that is
    stopped early has seen something of everything.
    """
    found = [entry for name in _modules() for entry in importlib.import_module(name).entries()]
    patterns = [pattern if "/" in pattern else f"*{pattern}*" for pattern in only]
    chosen = set(family)
    unknown = chosen - {entry.family for entry in found}
    if unknown:
        raise SystemExit(f"no family {sorted(unknown)[0]!r}; there are {', '.join(sorted({e.family for e in found}))}")
    wanted = [
        entry
        for entry in found
        if (not chosen or entry.family in chosen)
        and (not patterns or any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns))
    ]
    return _dealt(wanted)


def entry(name: str) -> Entry:
    """Return the model of a name."""
    return next(found for found in entries() if found.name == name)


def _modules() -> list[str]:
    return sorted(f"{families.__name__}.{module.name}" for module in pkgutil.iter_modules(families.__path__))


def _dealt(given: list[Entry]) -> list[Entry]:
    by_family: dict[str, list[Entry]] = {}
    for one in sorted(given, key=lambda one: hashlib.sha256(one.name.encode()).digest()):
        by_family.setdefault(one.family, []).append(one)
    longest = max(map(len, by_family.values()), default=0)
    return [members[i] for i in range(longest) for members in by_family.values() if i < len(members)]
