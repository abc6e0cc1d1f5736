"""One file per method; a file's existence is its registration.

Files that begin with an underscore hold helpers; ``base.py`` has the two abstract bases, ``params.py`` the tensors of
a method, ``adapter.py`` what holds them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType

from lorac.discovery import import_modules
from lorac.variants._missing_method import MissingMethod, unknown_method_error
from lorac.variants.base import Variant, is_concrete

__all__ = ["find_variant", "variants"]


@functools.cache
def _load_all() -> None:
    for _ in import_modules(sys.modules[__name__]):
        pass


def _subclasses(parent: type[Variant]) -> Iterator[type[Variant]]:
    for child in parent.__subclasses__():
        if is_concrete(child):
            yield child
        yield from _subclasses(child)


def variants() -> dict[str, type[Variant]]:
    """Every method by name: those of this folder, and those the user has subclassed anywhere by names of their own."""
    _load_all()
    found = _subclasses(Variant)  # type: ignore[type-abstract]  # the root of the search is abstract
    methods = [child for child in found if child is not MissingMethod]
    ours = f"{__name__}."
    return {child.name: child for child in sorted(methods, key=lambda c: (c.name, c.__module__.startswith(ours)))}


def find_variant(name: str, homes: Mapping[str, str] | None = None) -> type[Variant]:
    """The method called ``name``.

    Args:
        name: its name.
        homes: method -> the module that its class is in, where a file tells it.

    Raises:
        UnknownMethod: no method has that name, or its class is not imported.
    """
    found = variants()
    if name not in found:
        raise unknown_method_error(name, homes or {}, found)
    return found[name]


class _CallableModule(ModuleType):
    """This package, callable: importing it makes it the attribute ``lorac.variants``, where the function belongs."""

    def __call__(self) -> dict[str, type[Variant]]:
        return variants()


sys.modules[__name__].__class__ = _CallableModule
