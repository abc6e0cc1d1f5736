"""The command line, in the words of the Python interface. One file per group of commands.

Exit codes, for scripts:

    0    done
    1    refused: a file, a model or a choice is wrong, and the message says why; or the reader of the output is gone
    2    the command line itself is wrong
    3    a fault of lorac; --traceback shows where
    130  interrupted
"""

import contextlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from lorac.cli import adapters, artifacts, demo, merging, models, serving, training
from lorac.cli._output import SHOWS_ALL, format_error, reword
from lorac.cli._user_modules import add_import_option
from lorac.errors import LoracError, LoracWarning, translate_import_errors
from lorac.version import VERSION

NAME = "lorac"
REFUSED, OUR_FAULT, INTERRUPTED = 1, 3, 130
EPILOG = "Exits with 0, or with 1 (refused), 2 (a wrong command line), 3 (a fault of lorac), 130 (interrupted)."

app = typer.Typer(
    name=NAME,
    help="Compile a model and its adapters into one program, and swap the adapters while it runs.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for group in (demo, models, training, adapters, merging, artifacts, serving):
    for command in group.COMMANDS:
        app.command()(add_import_option(command))


def _print_version(is_given: bool) -> None:
    if is_given:
        print(f"lorac {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[bool, typer.Option(SHOWS_ALL, help="Show an error's place, and libraries' warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print lorac's version.")
    ] = False,
) -> None:
    """Compile a model and its adapters into one program, and swap the adapters while it runs."""


def main() -> None:
    """Run the command line; print an error as its message, and set the exit code.

    Raises:
        SystemExit: always.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # code pages of Windows lack characters that are printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _print_warnings(), translate_import_errors():
            app(prog_name=NAME)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else REFUSED
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = REFUSED
    except LoracError as error:
        code = _print_error(error, reword(format_error(error), typer.main.get_command(app)), REFUSED)
    except Exception as error:
        message = f"lorac itself failed: {type(error).__name__}: {error}\n  `lorac {SHOWS_ALL} …` shows where"
        code = _print_error(error, message, OUR_FAULT)
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # Python must not flush again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = REFUSED
    raise SystemExit(code)


@contextlib.contextmanager
def _print_warnings() -> Iterator[None]:
    """Print lorac's warnings like its errors, and drop those of installed libraries, which a user cannot change."""

    def show(message: Warning | str, category: type[Warning], filename: str, *place: Any, **more: Any) -> None:
        if issubclass(category, LoracWarning):
            print(f"lorac.{category.__name__}: {message}", file=sys.stderr)
        elif SHOWS_ALL in sys.argv[1:] or not {"site-packages", "dist-packages"} & {*Path(filename).parts}:
            original(message, category, filename, *place, **more)

    original = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default", LoracWarning)
        warnings.showwarning = show
        yield


def _print_error(error: Exception, message: str, code: int) -> int:
    if SHOWS_ALL in sys.argv[1:]:
        traceback.print_exception(error)
    print(message, file=sys.stderr)
    return code
