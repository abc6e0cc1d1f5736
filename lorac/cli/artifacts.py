"""Commands about compiled folders: run, swap, bench."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from lorac.cli._hosts import parse_spec
from lorac.cli._inputs import Inputs, arrays_of, read_inputs, spelled
from lorac.cli._shown import Json, show, table
from lorac.errors import ChoiceError, LoracError, UnknownOption
from lorac.ir.store.disk import told
from lorac.progress import progress

Folder = Annotated[Path, typer.Argument(help="A folder written by `lorac compile`.")]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for command in (run, swap, bench):
        app.command()(command)


def run(
    folder: Folder,
    inputs: Inputs,
    adapters: Annotated[str, typer.Option(help="none, NAME, or A=0.7,B=0.3; default: the active ones.")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the outputs to this .npz file.")] = None,
    json: Json = False,
) -> None:
    """Call a compiled model."""
    import numpy as np

    choice = {"adapters": parse_spec(adapters)} if adapters else {}
    with progress("run") as report:
        report.step("loading")
        compiled, arrays = _loaded(folder), read_inputs(inputs)
        report.step("calling")
        outputs = arrays_of(_answered(compiled, arrays, **choice))
    if out is not None:
        with told(out, UnknownOption, "written"):
            np.savez(out, **outputs)
    rows = [
        {
            "output": name,
            "shape": list(value.shape),
            "dtype": str(value.dtype),
            "mean": float(value.mean()),
            "std": float(value.std()),
        }
        for name, value in outputs.items()
    ]
    shown = [(*list(row.values())[:3], f"{row['mean']:.6g}", f"{row['std']:.6g}") for row in rows]
    show(rows, table(("output", "shape", "dtype", "mean", "std"), shown), as_json=json)


def swap(
    folder: Folder,
    adapters: Annotated[str, typer.Argument(help="none, NAME, or A=0.7,B=0.3.")],
    save: Annotated[bool, typer.Option(help="Make the choice the folder's active one.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the choice for ONNX Runtime alone (.onnx_adapter).")
    ] = None,
    json: Json = False,
) -> None:
    """Swap adapters in a compiled model and report what it cost."""
    with progress("swap") as steps:
        steps.step("loading")
        compiled = _loaded(folder)
        steps.step("swapping")
        report = compiled.swap(parse_spec(adapters))
        if out is not None:
            steps.step("writing")
            compiled.save_choice(out, parse_spec(adapters))
        if save:
            steps.step("saving")
            compiled.save(folder)
    line = (
        f"{report.state}: {report.sites} sites, {report.bytes:,} bytes, {report.seconds * 1e3:.2f} ms, "
        f"calls held {report.blocked_seconds * 1e3:.2f} ms"
    )
    show(dataclasses.asdict(report) | {"active": compiled.active}, line, as_json=json)


def bench(
    folder: Folder,
    inputs: Inputs,
    rounds: Annotated[int, typer.Option(min=1, help="Calls per choice.")] = 20,
    json: Json = False,
) -> None:
    """Time calls with each adapter and without, and the swaps between them: medians, ratio to no adapter last."""
    with progress("bench") as report:
        report.step("loading")
        compiled, arrays = _loaded(folder), read_inputs(inputs)
        choices: list[Any] = [None, *compiled.adapters]
        calls: dict[Any, list[float]] = {choice: [] for choice in choices}
        swaps: dict[Any, list[float]] = {choice: [] for choice in choices}
        for number in range(rounds):
            report.step(f"round {number + 1} of {rounds}")
            _round(compiled, arrays, calls, swaps)
    base = statistics.median(calls[None])
    rows = [
        {
            "adapters": choice or "none",
            "swap_ms": statistics.median(swaps[choice]) * 1e3,
            "call_ms": statistics.median(calls[choice]) * 1e3,
            "ratio": statistics.median(calls[choice]) / base,
        }
        for choice in choices
    ]
    shown = [(row["adapters"], *(f"{value:.3f}" for value in list(row.values())[1:])) for row in rows]
    show(rows, table(("adapters", "swap ms", "call ms", "ratio"), shown), as_json=json)


def _round(compiled: Any, arrays: dict[str, Any], calls: dict[Any, list[float]], swaps: dict[Any, list[float]]) -> None:
    """One swap and one call of each choice, timed behind a call that nobody times."""
    for choice, times in calls.items():
        swaps[choice].append(compiled.swap(choice).seconds)
        _answered(compiled, arrays)
        begun = time.perf_counter()
        compiled(**arrays)
        times.append(time.perf_counter() - begun)


def _loaded(folder: Path) -> Any:
    import lorac

    return lorac.load(folder)


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
        raise ChoiceError(
            f"the program cannot compute with {spelled(arrays)}: {type(error).__name__}: {error}",
            next_step="give arrays as the model takes them, with the ids and sizes it was compiled for",
        ) from error
