"""Commands about compiled folders: run, swap, bench."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lorac.cli._hosts import parse_spec
from lorac.errors import ChoiceError, LoracError, UnknownOption
from lorac.ir.store.disk import told

Folder = Annotated[Path, typer.Argument(help="A folder written by `lorac compile`.")]
Inputs = Annotated[Path, typer.Option("--inputs", "-i", help="An .npz file: one array per input of the model.")]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for command in (run, swap, bench):
        app.command()(command)


def run(
    folder: Folder,
    inputs: Inputs,
    adapters: Annotated[str, typer.Option(help="none, NAME, or A=0.7,B=0.3; default: the active ones.")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the outputs to this .npz file.")] = None,
) -> None:
    """Call a compiled model."""
    import numpy as np

    compiled, arrays = _loaded(folder), _arrays(inputs)
    choice = {"adapters": parse_spec(adapters)} if adapters else {}
    outputs = _named_outputs(_answered(compiled, arrays, **choice))
    if out is not None:
        with told(out, UnknownOption, "written"):
            np.savez(out, **outputs)
    table = Table("output", "shape", "dtype", "mean", "std")
    for name, value in outputs.items():
        statistic = (f"{value.mean():.6g}", f"{value.std():.6g}")
        table.add_row(name, str(list(value.shape)), str(value.dtype), *statistic)
    Console().print(table)


def swap(
    folder: Folder,
    adapters: Annotated[str, typer.Argument(help="none, NAME, or A=0.7,B=0.3.")],
    save: Annotated[bool, typer.Option(help="Make the choice the folder's active one.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the choice for ONNX Runtime alone (.onnx_adapter).")
    ] = None,
) -> None:
    """Swap adapters in a compiled model and report what it cost."""
    compiled = _loaded(folder)
    report = compiled.swap(parse_spec(adapters))
    print(
        f"{report.state}: {report.sites} sites, {report.bytes:,} bytes, {report.seconds * 1e3:.2f} ms, "
        f"calls held {report.blocked_seconds * 1e3:.2f} ms"
    )
    if out is not None:
        compiled.save_choice(out, parse_spec(adapters))
    if save:
        compiled.save(folder)


def bench(
    folder: Folder, inputs: Inputs, rounds: Annotated[int, typer.Option(min=1, help="Calls per choice.")] = 20
) -> None:
    """Time calls with each adapter and without, and the swaps between them: medians, ratio to no adapter last."""
    compiled, arrays = _loaded(folder), _arrays(inputs)
    choices: list[Any] = [None, *compiled.adapters]
    calls: dict[Any, list[float]] = {choice: [] for choice in choices}
    swaps: dict[Any, list[float]] = {choice: [] for choice in choices}
    for _ in range(rounds):
        for choice in choices:
            swaps[choice].append(compiled.swap(choice).seconds)
            _answered(compiled, arrays)
            begun = time.perf_counter()
            compiled(**arrays)
            calls[choice].append(time.perf_counter() - begun)
    base = statistics.median(calls[None])
    table = Table("adapters", "swap ms", "call ms", "ratio")
    for choice in choices:
        call, change = statistics.median(calls[choice]), statistics.median(swaps[choice])
        table.add_row(choice or "none", f"{change * 1e3:.3f}", f"{call * 1e3:.3f}", f"{call / base:.3f}")
    Console().print(table)


def _loaded(folder: Path) -> Any:
    import lorac

    return lorac.load(folder)


def _arrays(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # a reader of zip files and arrays, fed with garbage, may raise anything
        raise UnknownOption(
            f"'{path}' cannot be read: {error}",
            next_step="numpy.savez(path, name=array, ...) writes one array per input of the model",
        ) from error


def _answered(compiled: Any, arrays: dict[str, Any], **choice: Any) -> Any:
    """The answer to a file's arrays; what the program makes of arrays that do not suit it is the file's fault.

    Raises:
        ChoiceError: it cannot compute with them.
    """
    try:
        return compiled(**arrays, **choice)
    except LoracError:
        raise
    except Exception as error:
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in arrays.items())
        raise ChoiceError(
            f"the program cannot compute with {shapes}: {type(error).__name__}: {error}",
            next_step="give arrays as the model takes them, with the ids and sizes it was compiled for",
        ) from error


def _named_outputs(answer: Any) -> dict[str, Any]:
    import numpy as np

    items = (
        answer.items() if hasattr(answer, "items") else enumerate(answer if isinstance(answer, tuple) else (answer,))
    )
    return {str(name): np.asarray(value) for name, value in items if hasattr(value, "shape")}
