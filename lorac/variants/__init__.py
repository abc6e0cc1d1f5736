"""The methods, in files of one method or one family; a method is registered by its file.

Files that begin with an underscore are helpers. ``base.py`` defines the abstract base classes, ``low_rank.py`` the
fields that LoRA-like methods share, ``params.py`` the tensors of a method, ``initialisers.py`` their start values, and
``adapter.py`` the adapter.
"""

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
    """Return every method by name: this folder's, and all other subclasses of ``Variant`` under other names."""
    _load_all()
    found = dict.fromkeys(child for child in _subclasses(Variant) if child is not MissingMethod)  # type: ignore[type-abstract]  # the root of the search is abstract
    prefix = f"{__name__}."
    return {child.name: child for child in sorted(found, key=lambda c: (c.name, c.__module__.startswith(prefix)))}


def find_variant(name: str, modules: Mapping[str, str] | None = None) -> type[Variant]:
    """Return the method called ``name``.

    Args:
        modules: method -> the module of its class, if a file records them.

    Raises:
        UnknownMethod: no method has that name, or its class is not imported.
    """
    found = variants()
    if name not in found:
        raise unknown_method_error(name, modules or {}, found)
    return found[name]


class _CallableModule(ModuleType):
    """This package as a callable: otherwise importing it would hide the public function ``lorac.variants``."""

    def __call__(self) -> dict[str, type[Variant]]:
        return variants()


sys.modules[__name__].__class__ = _CallableModule
