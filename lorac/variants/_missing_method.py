"""The placeholder for a method whose class is not imported.

Adapter files name methods without their code, so that reading a file runs no code. An artifact's precomputed normal
forms work without the class (``lorac.storage.normal_forms``); all other uses raise ``UnknownMethod``.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from lorac.errors import UnknownMethod, nearest_name
from lorac.variants.base import ParamSpec, Site, Variant, iterate_fields

_SCRIPT = "__main__"


@dataclass(frozen=True, kw_only=True)
class MissingMethod(Variant):
    """The placeholder for a method whose class is not imported.

    Attributes:
        hyper_parameters: the method's hyper-parameters, as the file records them.
        modules: method -> the module of its class, as the file records them (``class_modules``).
        missing: the name of the method without a class: this method, or a method in its fields.
    """

    method_name: str
    hyper_parameters: Mapping[str, object]
    modules: Mapping[str, str]
    missing: str

    @property
    def name(self) -> str:  # type: ignore[override]  # per instance here, per class in other methods
        return self.method_name

    @property
    def settings(self) -> Mapping[str, object]:
        return self.hyper_parameters

    def params(self, site: Site) -> dict[str, ParamSpec]:
        self.require_class()

    def at_path(self, path: str) -> Variant:
        self.require_class()

    def check(self, site: Site) -> None:
        self.require_class()

    def require_class(self) -> NoReturn:
        raise unknown_method_error(self.missing, self.modules, ())


def class_modules(variant: Variant) -> dict[str, str]:
    """Return method -> the module of its class, for a variant and the methods in its fields, except lorac's methods."""
    if isinstance(variant, MissingMethod):
        return dict(variant.modules)
    methods = [value for value in iterate_fields(variant) if isinstance(value, Variant)]
    modules = {method.name: type(method).__module__ for method in methods}
    return {name: module for name, module in modules.items() if module.partition(".")[0] != "lorac"}


def unknown_method_error(name: str, modules: Mapping[str, str], known: Iterable[str]) -> UnknownMethod:
    """Return the error for a method whose class is not imported.

    Args:
        name: the method's name in a file.
        modules: method -> the module of its class, as the file records them.
        known: the names of the methods whose class is imported.
    """
    module = modules.get(name)
    if module is None:
        return UnknownMethod(
            f"no method is called '{name}'",
            nearest=nearest_name(name, known),
            next_step="list the methods by `lorac variants`, or import the class of your own first, on the command "
            "line by --import MODULE",
        )
    # A script's module is named __main__, which cannot be imported later.
    script = module == _SCRIPT
    where, argument = ("the script that wrote the file", "FILE.py") if script else (f"the module '{module}'", module)
    return UnknownMethod(
        f"the method '{name}' has no class in this process: it was defined in {where}",
        next_step=f"import {'that script' if script else module}, on the command line by --import {argument}",
    )
