"""A method of which this process has no class: what its files say of it, and what to import.

Files name methods and bring none, so that reading one runs no code of others. What an artefact has computed of such a
method serves all the same (``lorac.storage.normal_forms``); all else asks its class, and is answered by one error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lorac.errors import UnknownMethod, nearest_name
from lorac.ir.sites import Site
from lorac.variants.base import Variant, iterate_fields
from lorac.variants.params import ParamSpec

_SCRIPT = "__main__"


@dataclass(frozen=True, kw_only=True)
class MissingMethod(Variant):
    """In the place of a method whose class is not imported.

    Attributes:
        called: the method's name.
        recorded: its hyper-parameters, as its file has them.
        homes: as ``homes`` tells them of the method itself.
        unknown: which of those methods has no class here.
    """

    called: str
    recorded: Mapping[str, Any]
    homes: Mapping[str, str]
    unknown: str

    @property
    def name(self) -> str:  # type: ignore[override]  # of each its own, where classes share theirs
        return self.called

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.recorded

    def params(self, site: Site) -> dict[str, ParamSpec]:
        self.require_class()

    def at_path(self, path: str) -> Variant:
        self.require_class()

    def check(self, site: Site) -> None:
        self.require_class()

    def require_class(self) -> NoReturn:
        raise unknown_method_error(self.unknown, self.homes, ())


def homes(variant: Variant) -> dict[str, str]:
    """Method -> the module of its class, of a variant and of those in its fields, where the class is not lorac's."""
    if isinstance(variant, MissingMethod):
        return dict(variant.homes)
    methods = [found for found in iterate_fields(variant) if isinstance(found, Variant)]
    modules = {found.name: type(found).__module__ for found in methods}
    return {name: module for name, module in modules.items() if module.partition(".")[0] != "lorac"}


def unknown_method_error(name: str, homes: Mapping[str, str], known: Iterable[str]) -> UnknownMethod:
    """The error for a method that has no class here.

    Args:
        name: what a file calls it.
        homes: method -> the module of its class, as the file has them.
        known: the methods that have one.
    """
    home = homes.get(name)
    if home is None:
        return UnknownMethod(
            f"no method is called '{name}'",
            nearest=nearest_name(name, known),
            next_step="`lorac variants` lists them; one of your own is known once its class is imported, "
            "on the command line by --import MODULE",
        )
    # A script calls itself by a name that leads nowhere once it has ended.
    script = home == _SCRIPT
    what, module = ("the script that wrote it", "FILE.py") if script else (f"the module '{home}'", home)
    return UnknownMethod(
        f"the method '{name}' has no class in this process: it was defined in {what}",
        next_step=f"import {'that file' if script else home}, on the command line by --import {module}",
    )
