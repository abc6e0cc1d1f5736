"""``--import``: modules of the user, imported before a command runs so that their methods are known.

``add_import_option`` adds the option to the parameters of a command.
"""

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from lorac.errors import LoracError, OptionError
from lorac.source_lines import innermost_user_line

OPTION = "--import"
_HELP = "Import a module of your own first, for the methods in it: its name, or a .py file; may be given several times."
_NEXT_STEP = f"give {OPTION} a module's name, or the path of a .py file"
_PARAMETER = "imported"
_ImportOption = Annotated[list[str], typer.Option(OPTION, metavar="MODULE", help=_HELP)]


def add_import_option(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the option ``--import`` added."""
    signature = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def run(*args: object, imported: Sequence[str] = (), **kwargs: object) -> None:
        for module in imported:
            import_user_module(module)
        command(*args, **kwargs)

    option = inspect.Parameter(_PARAMETER, inspect.Parameter.KEYWORD_ONLY, default=[], annotation=_ImportOption)
    parameters = [*signature.parameters.values(), option]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # functions take attributes
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def import_user_module(module: str) -> ModuleType:
    """Import a module by its name, also from the working folder, or from its file.

    Raises:
        OptionError: it does not exist, or its code raises.
    """
    file = Path(module)
    is_file = file.suffix == ".py"
    if is_file and not file.is_file():
        raise OptionError(f"the file '{module}' does not exist", next_step=_NEXT_STEP)
    try:
        if is_file:
            return _import_file(file)
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(module)
    except LoracError:
        raise
    except Exception as error:  # it is the user's own code
        where = innermost_user_line(traceback.extract_tb(error.__traceback__))
        raise OptionError(
            f"'{module}' cannot be imported: {type(error).__name__}: {error}{f' in {where}' if where else ''}",
            next_step=_NEXT_STEP,
        ) from error


def _import_file(file: Path) -> ModuleType:
    name, path = file.stem, file.resolve()
    known = sys.modules.get(name)
    if known is not None:
        if Path(getattr(known, "__file__", None) or "").resolve() == path:
            return known
        raise OptionError(
            f"'{file}' cannot be imported as '{name}': another module has the name", next_step="rename the file"
        )
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
