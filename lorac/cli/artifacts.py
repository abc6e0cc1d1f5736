"""Commands about compiled folders: run, swap, bench, export-web."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lorac.cli._inputs import Array, InputsOption, format_inputs, read_inputs, to_arrays
from lorac.cli._models import (
    AdapterOption,
    CompiledOrModel,
    PrepackedOption,
    TrustOption,
    load_compiled,
    parse_choice,
)
from lorac.cli._output import JsonOption, make_table, print_report
from lorac.errors import ChoiceError, LoracError, OptionError
from lorac.progress import progress
from lorac.storage.paths import translate_os_errors

if TYPE_CHECKING:
    from lorac.session.compiled import Compiled

FolderArgument = Annotated[Path, typer.Argument(help="A folder written by `lorac compile`.")]
_CALL_HEADERS = ("adapters", "swap ms", "call ms", "ratio")
_TEXT_HEADERS = ("adapters", "swap ms", "first token ms", "read tokens/s", "written tokens/s", "ratio")


def run(  # noqa: PLR0913, PLR0917  (an argument per option)
    model: CompiledOrModel,
    inputs: InputsOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Continue this text.")] = None,
    image: Annotated[list[Path], typer.Option(help="An image before the prompt; several: one option each.")] = [],  # noqa: B006  (as --adapter)
    adapter: AdapterOption = [],  # noqa: B006  (typer's way to say "any number")
    adapters: Annotated[str, typer.Option(help="none, NAME, or A=0.7,B=0.3; default: the active ones.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Sample tokens; 0 takes the best. Default: the model's setting.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the outputs to this .npz file.")] = None,
    prepacked: PrepackedOption = None,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Call a compiled model with --inputs, let it continue a --prompt, or chat with it: /adapter NAME, /adapters."""
    if inputs is not None and prompt is not None:
        raise typer.BadParameter("--inputs and --prompt are two ways to call a model; give one")
    if image and prompt is None:
        raise typer.BadParameter("--image goes with a --prompt about it")
    if out is not None and inputs is None:
        raise typer.BadParameter("--out writes the outputs of a call with --inputs")
    if json and inputs is None and prompt is None:
        raise typer.BadParameter("--json is for --inputs and --prompt, not for a chat")
    with progress("run") as report:
        report.step("loading")
        compiled = load_compiled(model, adapter, prepacked=prepacked, trust=trust)
        if inputs is not None:
            report.step("calling")
            choice = {"adapters": parse_choice(adapters)} if adapters else {}
            outputs = to_arrays(_call_program(compiled, _read_inputs(compiled, inputs), **choice))
    if inputs is not None:
        _print_outputs(outputs, out, json)
        return
    from lorac.cli._chat import Chat
    from lorac.cli._generation import TextStreamer, TextWriter, replace_undecodable_text

    if adapters:
        compiled.swap(parse_choice(adapters))
    writer = TextWriter(compiled, max_new_tokens, temperature)
    replace_undecodable_text()
    if prompt is None:
        Chat(writer).run()
        return
    encoded = writer.encode_images(prompt, image) if image else writer.encode(prompt)
    streamer = TextStreamer(
        writer.tokenizer, (lambda _: None) if json else (lambda piece: print(piece, end="", flush=True))
    )
    writer.write(encoded, streamer)
    if json:
        print_report({"text": streamer.text, "tokens": streamer.tokens, "active": compiled.active}, as_json=True)
    else:
        print()


def _print_outputs(outputs: dict[str, Any], out: Path | None, json: bool) -> None:
    if out is not None:
        import numpy as np

        with translate_os_errors(out, OptionError, "written"):
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
    cells = [(*list(row.values())[:3], f"{row['mean']:.6g}", f"{row['std']:.6g}") for row in rows]
    print_report(rows, make_table(("output", "shape", "dtype", "mean", "std"), cells), as_json=json)


def swap(
    folder: FolderArgument,
    adapters: Annotated[str, typer.Argument(help="none, NAME, or A=0.7,B=0.3.")],
    save: Annotated[bool, typer.Option(help="Make the choice the folder's active one.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the choice for ONNX Runtime alone (.onnx_adapter).")
    ] = None,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Swap adapters in a compiled model and report the cost."""
    import lorac

    with progress("swap") as steps:
        steps.step("loading")
        compiled = lorac.load(folder, trust=trust)
        steps.step("swapping")
        report = compiled.swap(parse_choice(adapters))
        if out is not None:
            steps.step("writing")
            compiled.save_choice(out, parse_choice(adapters))
        if save:
            steps.step("saving")
            compiled.save(folder)
    line = (
        f"{report.state}: {report.sites} sites, {report.bytes:,} bytes, {report.seconds * 1e3:.2f} ms, "
        f"calls held {report.blocked_seconds * 1e3:.2f} ms"
    )
    print_report(dataclasses.asdict(report) | {"active": compiled.active}, line, as_json=json)


def bench(  # noqa: PLR0913, PLR0917  (an argument per option)
    model: CompiledOrModel,
    inputs: InputsOption = None,
    adapter: AdapterOption = [],  # noqa: B006  (typer's way to say "any number")
    rounds: Annotated[int, typer.Option(min=1, help="Calls per choice.")] = 20,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="The tokens of the prompt, without --inputs.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="The new tokens of each round, without --inputs.")] = 32,
    rows: Annotated[int, typer.Option(min=1, help="The prompts of a batch, without --inputs.")] = 1,
    settle: Annotated[
        bool, typer.Option("--settle", help="Make merged weights constants after each swap; for onnxruntime, fused.")
    ] = False,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Time calls with --inputs, or else generation, with each adapter and without, and print the medians.

    With --rows above 1, generation is also timed with the adapters in turn, one per row.
    """
    from lorac.cli._generation import time_choices, time_generation

    if inputs is not None and rows > 1:
        raise typer.BadParameter("--rows is for generation; with --inputs, a batch has the rows of its arrays")
    with progress("bench") as report:
        report.step("loading")
        compiled = load_compiled(model, adapter, trust=trust, active=None)
        if inputs is None:
            times = time_generation(compiled, prompt_tokens, new_tokens, rounds, rows, settle=settle)
        else:
            arrays = _read_inputs(compiled, inputs)

            def measure() -> tuple[float]:
                _call_program(compiled, arrays)  # an untimed call precedes each timed call
                begun = time.perf_counter()
                compiled(**arrays)
                return (time.perf_counter() - begun,)

            medians = time_choices(compiled, rounds, measure, settle=settle)
            base = medians[None][1]
            times = [
                {"adapters": choice or "none", "swap_ms": swap * 1e3, "call_ms": call * 1e3, "ratio": call / base}
                for choice, (swap, call) in medians.items()
            ]
    headers = _TEXT_HEADERS if inputs is None else _CALL_HEADERS
    cells = [(row["adapters"], *(f"{value:.3f}" for value in list(row.values())[1:])) for row in times]
    print_report(times, make_table(headers, cells), as_json=json)


def export_web(
    folder: FolderArgument,
    out: Annotated[Path, typer.Argument(help="The folder to write: new, empty, or an older page.")],
    modules: Annotated[
        Path | None,
        typer.Option(help="A node_modules folder with the packages of a page; default: npm downloads them."),
    ] = None,
    part_mib: Annotated[int, typer.Option(min=1, help="The most MiB of a file, which some servers limit.")] = 64,
    json: JsonOption = False,
) -> None:
    """Write a web page that chats with a compiled model in the browser, for any server of files."""
    from lorac.web import export_web

    with progress("export-web") as steps:
        steps.step("writing")
        report = export_web(folder, out, modules=modules, part_mib=part_mib)
    line = (
        f"'{out}': a model of {report['model_bytes'] / 1e6:.1f} MB with {len(report['adapters'])} adapters; "
        f"python -m http.server -d {shlex.quote(str(out))} serves it here"
    )
    print_report(report, line, as_json=json)


def _read_inputs(compiled: Compiled, path: Path) -> Mapping[str, Array]:
    """Read the inputs of a call; for target eager as tensors, since the model's own code takes no arrays."""
    from lorac.ir.calls.call import convert_to_tensors

    arrays = read_inputs(path)
    return cast("Mapping[str, Array]", convert_to_tensors(arrays)) if compiled.engine.target == "eager" else arrays


def _call_program(compiled: Compiled, arrays: Mapping[str, Array], **choice: object) -> object:
    """Call a program with the arrays of a file."""
    try:
        return compiled(**arrays, **choice)
    except (LoracError, Warning):  # warnings may be errors
        raise
    except Exception as error:
        raise ChoiceError(
            f"the program cannot compute with {format_inputs(arrays)}: {type(error).__name__}: {error}",
            next_step="give arrays as the model takes them, with the ids and sizes it was compiled for",
        ) from error


COMMANDS = (run, swap, bench, export_web)
