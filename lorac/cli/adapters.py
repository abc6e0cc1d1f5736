"""Commands about files of adapters: check, inspect, convert, resize, extract, diff, analyse, retrieve."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorac.cli._inputs import INPUTS_HELP, read_inputs
from lorac.cli._inspection import describe_adapter_file, describe_folder, format_check, format_contents
from lorac.cli._models import load_found_model, load_model
from lorac.cli._output import JsonOption, complete_names, format_number, make_table, print_report, reword
from lorac.errors import FormatError, LoracError, OptionError, not_one_of
from lorac.progress import progress
from lorac.session.model_folders import MODEL_HELP
from lorac.storage.atomic_folders import MANIFEST
from lorac.storage.paths import check_new
from lorac.storage.remote import NAME_FORMS, find_source

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from lorac.frontend.model_view import Model
    from lorac.variants.adapter import Adapter


def _list_formats() -> list[str]:
    from lorac.formats import formats

    return [name for name, found in formats().items() if found.writes]


CHECKPOINT_HELP = (
    f"A folder saved by transformers or diffusers, {NAME_FORMS}, read a tensor at a time; or package.module:function."
)
MISFIT = 1
"""The exit code of ``check`` and ``inspect`` where an adapter does not fit the model."""
_MEASURES = ("entanglement",)
_DTYPES = ("float64", "float32", "float16", "bfloat16")
SourceArgument = Annotated[Path, typer.Argument(help=f"An adapter's file or folder, {NAME_FORMS}.")]
DestinationArgument = Annotated[Path, typer.Argument(help="Where to write: a new path.", callback=check_new)]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Where to write: a new path.", callback=check_new)]
ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
FormatOption = Annotated[
    str,
    typer.Option(
        "--to",
        "--format",
        "-f",
        help="The format; by default peft, and native for a difference that is no LoRA.",
        autocompletion=_list_formats,
    ),
]
_ENGINE_HELP = "The engine that is to run it: vllm, sglang, llama.cpp, ollama, genai, diffusers, mlx or olive."
_ENGINES = complete_names("lorac.formats.engines", "ENGINES")
EngineOption = Annotated[str, typer.Option("--for", help=_ENGINE_HELP, autocompletion=_ENGINES)]
RankOption = Annotated[int | None, typer.Option("--rank", "-r", help="The largest rank, a whole number above 0.")]
ToleranceOption = Annotated[
    float | None,
    typer.Option("--tolerance", "-t", help="The largest error of a site, as a share of its change's norm."),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="float64, float32, float16 or bfloat16.", autocompletion=lambda: [*_DTYPES])
]


def inspect(
    path: Annotated[Path, typer.Argument(help=f"An adapter's file or folder, or a compiled folder: {NAME_FORMS}.")],
    model: ModelOption = "",
    json: JsonOption = False,
) -> None:
    """Print the contents of a compiled folder or an adapter's file; with --model also the parts that do not fit it.

    Sites whose paths differ only in numbers share a row, with the least and the greatest value of each measure.
    """
    import lorac

    with progress("inspect") as report:
        report.step("reading")
        path = find_source(path, "the path", FormatError, "unreadable")
        if (path / MANIFEST).is_file():
            contents = describe_folder(path)
        else:
            host, refusal = load_model(model) if model else None, None
            try:
                adapter = lorac.load_adapter(path, host)
            except LoracError as error:
                if host is None:
                    raise
                # Read the file without the model, to list everything in it that does not fit the model.
                adapter, refusal = lorac.load_adapter(path), error
            measures = lorac.inspect(adapter, host)
            if refusal is not None and not measures.mismatches:
                raise refusal
            contents = describe_adapter_file(adapter, path, measures)
    print_report(contents, *format_contents(contents), as_json=json)
    if contents.get("mismatches"):
        raise typer.Exit(MISFIT)


def check(
    context: typer.Context,
    adapters: Annotated[list[Path], typer.Argument(help=f"Files or folders of adapters, {NAME_FORMS}.")],
    model: ModelOption = "",
    engine: EngineOption = "",
    json: JsonOption = False,
) -> None:
    """Check that adapters fit a model, and an engine; print faults with remedies; a misfit exits with 1."""
    import lorac

    with progress("check", total=len(adapters)) as report:
        host, found = load_model(model) if model else None, []
        for path in adapters:
            report.step(str(path))
            one = lorac.check(path, host, for_=engine or None)
            steps = tuple(reword(step, context.find_root().command) for step in one.repairs)
            for word, value in {"ADAPTER": str(path), "MODEL": model or "MODEL"}.items():
                quoted = shlex.quote(value).replace("\\", r"\\")
                steps = tuple(re.sub(rf"\b{word}\b", quoted, step) for step in steps)
            found.append(dataclasses.replace(one, repairs=steps))
    print_report(found, *(line for one in found for line in format_check(one)), as_json=json)
    if not all(one.fits and not one.objections for one in found):
        raise typer.Exit(MISFIT)


def convert(  # noqa: PLR0913, PLR0917  (an argument per option)
    source: SourceArgument,
    destination: DestinationArgument,
    format: FormatOption = "",
    engine: EngineOption = "",
    model: ModelOption = "",
    rank: RankOption = None,
    tolerance: ToleranceOption = None,
    inputs: Annotated[
        Path | None,
        typer.Option("--inputs", "-i", help=f"With --for: inputs whose outputs should change least. {INPUTS_HELP}"),
    ] = None,
    dtype: DtypeOption = "",
    fix_names: Annotated[
        bool, typer.Option("--fix-names", help="Give layers the model's names where a file of PEFT's has others.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write an adapter in another format, or as the LoRA that an engine runs; --rank and --tolerance make a LoRA."""
    import lorac
    from lorac.formats.engines import find_engine

    if inputs is not None and not engine:
        raise OptionError("--inputs needs --for", next_step="give --for ENGINE, or leave --inputs out")
    if engine:
        rules = find_engine(engine)
        if format not in {"", rules.format}:
            raise OptionError(f"--for {engine} writes the format '{rules.format}'", next_step="leave --to out")
        if not model:
            raise OptionError(f"{rules.version} chooses layers by the base", next_step="give --model BASE")
        if dtype and dtype not in rules.dtypes:
            raise not_one_of(f"{rules.version} does not read tensors of --dtype", dtype, rules.dtypes)
    with progress("convert") as report:
        report.step("reading")
        host = load_model(model) if model else None
        adapter = lorac.load_adapter(source, host, fix_names=fix_names)
        if engine and host is not None:
            report.step("making a LoRA")
            given = read_inputs(inputs) if inputs else None
            adapter = lorac.convert(adapter, for_=engine, model=host, rank=rank, tolerance=tolerance, inputs=given)
            format = rules.format
        elif rank is not None or tolerance is not None:
            report.step("making a LoRA")
            adapter = lorac.to_lora(adapter, host, rank=rank, tolerance=tolerance)
        report.step("writing")
        save(adapter, destination, format or "peft", host, dtype=dtype, as_json=json)


def resize(
    source: SourceArgument,
    destination: DestinationArgument,
    format: FormatOption = "peft",
    model: ModelOption = "",
    rank: RankOption = None,
    tolerance: ToleranceOption = None,
    json: JsonOption = False,
) -> None:
    """Give a LoRA another rank: the nearest LoRA of a lower rank, or the same change in a higher rank."""
    import lorac

    with progress("resize") as report:
        report.step("reading")
        host = load_model(model) if model else None
        adapter = lorac.resize(lorac.load_adapter(source, host), rank, tolerance=tolerance)
        report.step("writing")
        save(adapter, destination, format, host, as_json=json)


def extract(
    tuned: Annotated[str, typer.Argument(help=CHECKPOINT_HELP)],
    base: Annotated[str, typer.Argument(help="The model that it was tuned from, in the same form.")],
    destination: DestinationArgument,
    format: FormatOption = "",
    rank: RankOption = None,
    tolerance: ToleranceOption = None,
    dtype: DtypeOption = "",
    json: JsonOption = False,
) -> None:
    """Write the difference of two models as an adapter: the nearest LoRA, or without --rank and --tolerance exactly."""
    import lorac
    from lorac.merging.stored_model import StoredModel

    found = [find_source(spec, "the model", OptionError) for spec in (tuned, base)]
    views = [StoredModel.open(path).view if path.is_dir() else load_found_model(path)[0] for path in found]
    adapter = lorac.extract(*views, rank=rank, tolerance=tolerance, name=destination.stem)
    save(adapter, destination, format, views[1], dtype=dtype, as_json=json)


def diff(
    first: SourceArgument,
    second: SourceArgument,
    model: ModelOption = "",
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Compare the spaces of this many largest singular values.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare two adapters site by site: their norms, and the overlaps of their output spaces and input spaces."""
    import lorac

    with progress("diff") as report:
        report.step("reading")
        host = load_model(model) if model else None
        one, other = (lorac.load_adapter(path, host) for path in (first, second))
        report.step("comparing")
        found = lorac.diff(one, other, host, rank=rank)
    rows = [
        (path, site.first, site.second, site.difference, site.cosine, *(site.overlap if site.outputs else ()))
        for path, site in found.items()
    ]
    headers = ("site", str(first), str(second), "difference", "cosine", "overlap of outputs", "of inputs")
    cells = [[format_number(cell) for cell in (*row, *[None] * (len(headers) - len(row)))] for row in rows]
    print_report(found, make_table(headers, cells), as_json=json)


def analyse(
    measure: Annotated[str, typer.Argument(help="entanglement.", autocompletion=lambda: [*_MEASURES])],
    path: SourceArgument,
    model: ModelOption = "",
    plot: Annotated[
        Path | None, typer.Option(help="Draw entropies and spectra into this file, such as entanglement.png.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Print the entanglement entropies of an adapter's changes; low-rank changes have a valley at the centre."""
    import lorac
    from lorac.analysis.entanglement import adapter_entanglement, draw_entanglement

    if measure not in _MEASURES:
        raise not_one_of("there is no measure", measure, _MEASURES)
    with progress("analyse") as report:
        report.step("reading")
        host = load_model(model) if model else None
        adapter = lorac.load_adapter(path, host)
        report.step("measuring")
        found = adapter_entanglement(adapter, host)
    if plot is not None:
        draw_entanglement(found, plot)
    rows = [
        (site, len(one.spectrum), one.humps[0], one.centre, one.humps[1], one.valley)
        if one is not None
        else (site, 0, *[None] * 4)
        for site, one in found.items()
    ]
    headers = ("site", "rank", "S within outputs", "S at the centre", "S within inputs", "valley")
    print_report(found, make_table(headers, [map(format_number, row) for row in rows]), as_json=json)


def retrieve(
    prompt: Annotated[str, typer.Argument(help="The wanted concept, in words.")],
    folder: Annotated[Path, typer.Option("--from", help="A folder of adapters, one file or folder each.")],
    retriever: Annotated[
        Path | None,
        typer.Option("--retriever", help="The folder of Retriever.save; default: the folder `retriever` in --from."),
    ] = None,
    top: Annotated[int, typer.Option("--top", "-k", help="How many adapters, a whole number above 0.")] = 3,
    model: ModelOption = "",
    json: JsonOption = False,
) -> None:
    """Print the adapters of a folder that fit a prompt best, by their weights alone."""
    from lorac.diffusion.retrieval import Retriever, find_adapters

    host = load_model(model) if model else None
    found = find_adapters(Retriever.load(retriever or folder / "retriever"), prompt, folder, top=top, model=host)
    rows = [(match.name, format_number(match.score), match.path) for match in found]
    print_report(found, make_table(("adapter", "cosine", "path"), rows), as_json=json)


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        OptionError: adapters are not stored in it.
    """
    import torch

    if name not in _DTYPES:
        raise not_one_of("adapters are not stored in --dtype", name, _DTYPES)
    found: torch.dtype = getattr(torch, name)
    return found


def save(
    adapter: Adapter, destination: Path, format: str, model: Model | None, *, dtype: str = "", as_json: bool
) -> None:
    """Write an adapter, and print its path, and the rank and error of each site that was approximated.

    Args:
        format: the format; empty: peft for a LoRA, else native.
        dtype: the dtype of its tensors; empty: their own.
    """
    import lorac
    from lorac.formats.engines import ENGINE, ENGINES

    adapter = adapter.to(parse_dtype(dtype)) if dtype else adapter
    format = format or ("peft" if adapter.variant.name == "lora" else "native")
    lorac.save_adapter(adapter, destination, format=format, model=model)
    errors, seen = (adapter.provenance.get(name, {}) for name in ("errors", "output_errors"))
    ranks = {path: adapter.variant.at_path(path).settings.get("r") for path in errors}
    columns = {"site": [*errors], "rank": ranks.values(), "error": errors.values()}
    columns |= {"error on inputs": [seen.get(path) for path in errors]} if seen else {}
    rows = [(path, *map(format_number, cells)) for path, *cells in zip(*columns.values(), strict=True)]
    parts: list[Table | str] = [make_table(columns, rows)] if rows else []
    report = {"path": str(destination), "format": format, **({"ranks": ranks, "errors": errors} if errors else {})}
    if seen:
        report["output_errors"] = seen
        parts.append(f"the model's outputs on the inputs: {format_number(seen[''])} of the adapter's effect")
    if engine := ENGINES.get(adapter.provenance.get(ENGINE, "")):
        widest = max((at["lora_A"].shape[-2] for at in adapter.tensors.values()), default=1)
        step = next((one for one in engine.ranks if one >= widest), widest)
        report["usage"] = engine.usage.format(path=destination, rank=step)
        parts.append(f"{engine.version}: {report['usage']}")
    print_report(report, f"{destination}: {format}", *parts, as_json=as_json)


COMMANDS = (check, inspect, convert, resize, extract, diff, analyse, retrieve)
