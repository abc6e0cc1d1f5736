"""Commands about models and methods: sites, variants, compile, explain."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from lorac.cli._hosts import (
    MODEL_HELP,
    Adapters,
    CompiledOrModel,
    load_compiled,
    load_model,
    load_with_tokenizer,
    named_adapters,
    parse_spec,
)
from lorac.cli._inputs import INPUTS_HELP, read_inputs
from lorac.cli._settings import DYNAMIC_HELP, RESERVE_HELP, names_of, reserve_of, shapes_of
from lorac.cli._shown import Json, show, table
from lorac.errors import OptionError
from lorac.ir.slots.planning import MODES
from lorac.ir.store.disk import told
from lorac.progress import progress

DTYPES = ("float32", "float64", "bfloat16", "float16")


def _targets() -> list[str]:
    from lorac.compiler.targets import targets

    return list(targets())


Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Mode = Annotated[str, typer.Option(help="auto, live, fused or baked.", autocompletion=lambda: list(MODES))]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float64, bfloat16 or float16; the model's own.", autocompletion=lambda: list(DTYPES)),
]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for command in (sites, variants, compile, explain):
        app.command()(command)


def sites(
    model: Model,
    targets: Annotated[str, typer.Option(help="Only those a pattern names.")] = "",
    json: Json = False,
) -> None:
    """Print every adaptable place of a model."""
    from lorac.ir.host.patterns import nothing_matches, select
    from lorac.ir.host.sites import find_sites

    with progress("sites") as report:
        report.step("loading the model")
        found = find_sites(load_model(model))
    wanted = list(found.values())
    if targets:
        wanted = select(found, names_of(targets), parameters=targets.split(",")) or select(found, targets)
        if not wanted:
            raise nothing_matches("(command line)", targets, found)
    told = [
        {
            "site": site.path,
            "kind": str(site.kind),
            "in": site.in_features,
            "out": site.out_features,
            "bias": site.bias is not None,
            "shares": list(site.shares),
        }
        for site in wanted
    ]
    rows = [
        (s.path, s.kind, s.in_features, s.out_features, "yes" if s.bias else "", ", ".join(s.shares)) for s in wanted
    ]
    show(told, table(("site", "kind", "in", "out", "bias", "shares its weight with"), rows), as_json=json)


def variants(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the page docs/methods.md.")] = False,
    json: Json = False,
) -> None:
    """Print every adapter method: its formula, its normal form and size on a layer, its paper and its files."""
    from lorac.analysis.methods import HEADERS, cells
    from lorac.analysis.methods import markdown as page
    from lorac.cli._methods import method_rows
    from lorac.variants import variants as known

    rows = method_rows(known().values())
    if markdown:
        print(page(rows), end="")
        return
    show(rows, table(HEADERS, map(cells, rows)), as_json=json)


def compile(  # noqa: PLR0913, PLR0917  (an argument per option)
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    adapter: Adapters = [],  # noqa: B006  (typer's way to say "any number")
    target: Annotated[
        str,
        typer.Option(help="eager, onnxruntime, tensorrt, or what another package offers.", autocompletion=_targets),
    ] = "onnxruntime",
    mode: Mode = "auto",
    active: Annotated[str, typer.Option(help="none, NAME, or A=0.7,B=0.3; auto: the only adapter.")] = "auto",
    dtype: Dtype = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; the model's own.")] = None,
    inputs: Annotated[Path | None, typer.Option("--inputs", "-i", help=f"Example inputs. {INPUTS_HELP}")] = None,
    reserve: Annotated[list[str], typer.Option(help=RESERVE_HELP)] = [],  # noqa: B006  (the same)
    dynamic: Annotated[list[str], typer.Option(help=DYNAMIC_HELP)] = [],  # noqa: B006  (the same)
    cache: Annotated[
        bool, typer.Option("--cache", help="Keep keys and values, so that the model writes text.")
    ] = False,
    weights: Annotated[str | None, typer.Option(help="int8 or int4: quantise the base; for onnxruntime.")] = None,
    capabilities: Annotated[str, typer.Option(help="Of the GPUs to build for, as 8.6,8.9,12.0; for tensorrt.")] = "",
    json: Json = False,
) -> None:
    """Compile a model and its adapters, and save the result, with the tokenizer beside the model."""
    import lorac

    room, choice = reserve_of(reserve), active if active == "auto" else parse_spec(active)
    examples = None if inputs is None else read_inputs(inputs)
    with progress("compile") as report:
        report.step("loading the model")
        host, tokenizer = load_with_tokenizer(model)
        report.step("compiling")
        compiled = lorac.compile(
            host,
            named_adapters(adapter),
            target=target,
            mode=mode,
            active=choice,
            reserve=room,
            example_inputs=examples,
            dynamic_shapes=shapes_of(dynamic, host, examples),
            dtype=dtype,
            device=device,
            # Other targets have no such options, and are told of none that is not asked for.
            **({"cache": True} if cache else {}),
            **({"weights": weights} if weights else {}),
            **({"target_capabilities": capabilities.split(",")} if capabilities else {}),
        )
        report.step("saving")
        compiled.save(out, tokenizer)
    names = list(compiled.adapters)
    told = {"folder": str(out), "target": target, "mode": mode, "adapters": names, "active": compiled.active}
    line = f"{out}: {target}, {mode}, adapters {', '.join(names) or 'none'}, active {compiled.active}"
    show(told, line, as_json=json)


def explain(
    model: CompiledOrModel,
    adapter: Adapters = [],  # noqa: B006  (the same)
    mode: Mode = "auto",
    target: Annotated[
        str | None,
        typer.Option(help="Say besides what this one would not compute, of a model.", autocompletion=_targets),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Draw it besides, as a page in this file.")] = None,
    json: Json = False,
) -> None:
    """Say per site what becomes of each adapter, and why not something cheaper."""
    with progress("explain") as report:
        report.step("loading")
        compiled = load_compiled(model, adapter, mode=mode, active=None)
        said = compiled.explain(target)
    show({field.name: getattr(said, field.name) for field in dataclasses.fields(said)}, str(said), as_json=json)
    if html is not None:
        with told(html, OptionError, "written"):
            written = compiled.graph.to_html(html)
        if not json:
            print(f"{written}: the picture")
