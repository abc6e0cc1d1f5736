"""Commands about models and methods: sites, variants, compile, explain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lorac.cli._hosts import ADAPTER_HELP, MODEL_HELP, load_model, named_adapters, parse_spec
from lorac.errors import UnknownOption
from lorac.ir.store.disk import told

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Adapters = Annotated[list[str], typer.Option("--adapter", "-a", help=ADAPTER_HELP)]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for command in (sites, variants, compile, explain):
        app.command()(command)


def sites(model: Model, targets: Annotated[str, typer.Option(help="Only those a pattern names.")] = "") -> None:
    """Print every adaptable place of a model."""
    from lorac.ir.host.patterns import KEYWORDS, nothing_matches, select
    from lorac.ir.host.sites import find_sites

    found = find_sites(load_model(model))
    wanted = list(found.values())
    if targets:
        chosen = targets if targets in KEYWORDS else tuple(targets.split(","))
        wanted = select(found, chosen, parameters=targets.split(",")) or select(found, targets)
        if not wanted:
            raise nothing_matches("(command line)", targets, found)
    table = Table("site", "kind", "in", "out", "bias", "shares its weight with")
    for site in wanted:
        bias = "yes" if site.bias else ""
        table.add_row(site.path, site.kind, str(site.in_features), str(site.out_features), bias, ", ".join(site.shares))
    Console(width=None).print(table)


def variants(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the page docs/methods.md.")] = False,
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
    table = Table()
    for header in HEADERS:
        table.add_column(header, no_wrap=header == "method")
    for row in rows:
        table.add_row(*map(escape, cells(row)))
    Console().print(table)


def compile(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    adapter: Adapters = [],  # noqa: B006  (typer's way to say "any number")
    target: Annotated[str, typer.Option(help="eager, onnxruntime, or what another package offers.")] = "onnxruntime",
    mode: Annotated[str, typer.Option(help="auto, live, fused or baked.")] = "auto",
    active: Annotated[str, typer.Option(help="none, NAME, or A=0.7,B=0.3; auto: the only adapter.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, float64, bfloat16 or float16; the model's own.")] = None,
) -> None:
    """Compile a model and its adapters, and save the result."""
    import lorac

    choice = active if active == "auto" else parse_spec(active)
    told: dict[str, Any] = {"target": target, "mode": mode, "active": choice, "dtype": dtype}
    compiled = lorac.compile(load_model(model), named_adapters(adapter), **told)
    compiled.save(out)
    print(f"{out}: {target}, {mode}, adapters {', '.join(compiled.adapters) or 'none'}, active {compiled.active}")


def explain(
    model: Model,
    adapter: Adapters = [],  # noqa: B006  (the same)
    mode: Annotated[str, typer.Option(help="auto, live, fused or baked.")] = "auto",
    html: Annotated[Path | None, typer.Option("--html", help="Draw it besides, as a page in this file.")] = None,
) -> None:
    """Say per site what becomes of each adapter, and why not something cheaper. MODEL may be a compiled folder."""
    import lorac

    if (Path(model) / "manifest.json").is_file():
        compiled = lorac.load(model)
    else:
        compiled = lorac.compile(load_model(model), named_adapters(adapter), mode=mode, active=None)
    print(compiled.explain())
    if html is not None:
        with told(html, UnknownOption, "written"):
            print(f"{compiled.graph.to_html(html)}: the picture")
