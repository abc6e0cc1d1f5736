"""Commands about models and methods: sites, variants, compile, explain."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from lorac.cli._compile_options import (
    DYNAMIC_HELP,
    RESERVE_HELP,
    parse_dynamic_shapes,
    parse_reserve,
    parse_targets,
    read_calibration,
)
from lorac.cli._inputs import INPUTS_HELP, read_inputs
from lorac.cli._models import (
    AdapterOption,
    CompiledOrModel,
    TrustOption,
    load_compiled,
    load_model,
    load_with_tokenizer,
    parse_adapters,
    parse_choice,
)
from lorac.cli._output import JsonOption, complete_names, make_table, print_report
from lorac.progress import progress
from lorac.session.model_folders import MODEL_HELP

if TYPE_CHECKING:
    from lorac.analysis.methods import MethodRow
    from lorac.ir.sites.site import Site
    from lorac.variants.base import Variant

DTYPES = ("float32", "float64", "bfloat16", "float16")


_TARGETS = complete_names("lorac.session.targets", "targets")
_MODES = complete_names("lorac.ir.slots.required_slots", "MODES")
ModelArgument = Annotated[str, typer.Argument(help=MODEL_HELP)]
ModeOption = Annotated[str, typer.Option(help="auto, live, fused or baked.", autocompletion=_MODES)]
DtypeOption = Annotated[
    str | None,
    typer.Option(help="float32, float64, bfloat16 or float16, else the model's.", autocompletion=lambda: list(DTYPES)),
]


def sites(
    model: ModelArgument,
    targets: Annotated[str, typer.Option(help="Only sites that match a pattern.")] = "",
    json: JsonOption = False,
) -> None:
    """Print the sites of a model: the places that adapters can change."""
    from lorac.frontend.model_view import ModelView
    from lorac.ir.sites.patterns import no_match_error, select_sites

    with progress("sites") as steps:
        steps.step("loading the model")
        found = ModelView.of(load_model(model)).sites
    selected = list(found.values())
    if targets:
        selected = select_sites(found, parse_targets(targets), parameters=targets.split(",")) or select_sites(
            found, targets
        )
        if not selected:
            raise no_match_error("(command line)", parse_targets(targets), found)
    report = [
        {
            "site": site.path,
            "kind": str(site.kind),
            "in": site.in_features,
            "out": site.out_features,
            "bias": site.bias is not None,
            "shares": list(site.shares),
        }
        for site in selected
    ]
    rows = [
        (s.path, s.kind, s.in_features, s.out_features, "yes" if s.bias else "", ", ".join(s.shares)) for s in selected
    ]
    print_report(
        report, make_table(("site", "kind", "in", "out", "bias", "shares its weight with"), rows), as_json=json
    )


def variants(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/methods.md.")] = False,
    json: JsonOption = False,
) -> None:
    """Print every adapter method: its formula, its normal form and size on a layer, its paper and its files."""
    from lorac.analysis.methods import HEADERS, render_markdown, row_cells
    from lorac.variants import variants as known

    rows = method_rows([*known().values()])
    if markdown:
        print(render_markdown(rows), end="")
        return
    print_report(rows, make_table(HEADERS, map(row_cells, rows)), as_json=json)


def method_rows(known: Sequence[type[Variant]]) -> tuple[MethodRow, ...]:
    """Return one row per method: its formula, its normal form, its size and its files."""
    from lorac.adapters.preparation import Preparer
    from lorac.analysis.methods import describe_methods
    from lorac.formats import formats
    from lorac.formats.peft.config import peft_types
    from lorac.ir.sites.site import BaseReader

    def refuse_base(site: Site) -> NoReturn:
        raise AssertionError(f"'{site.path}' stands for any layer of its shape")

    files = {variant: ["native"] for variant in known}
    by_name: dict[str, Collection[type[Variant]]] = {name: kind.variants for name, kind in peft_types().items()}
    by_name |= {name: format.methods for name, format in formats().items()}
    for name, methods in sorted(by_name.items()):
        for variant in methods:
            files.setdefault(variant, ["native"]).append(name)
    return describe_methods(known, Preparer({}, BaseReader(refuse_base, refuse_base)).reduction, files)


def compile(  # noqa: PLR0913, PLR0917  (an argument per option)
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    adapter: AdapterOption = [],  # noqa: B006  (typer's way to say "any number")
    target: Annotated[
        str,
        typer.Option(
            help="eager, onnxruntime, openvino, tensorrt, aoti, or another package's.", autocompletion=_TARGETS
        ),
    ] = "onnxruntime",
    mode: ModeOption = "auto",
    active: Annotated[str, typer.Option(help="none, NAME, or A=0.7,B=0.3; auto: the only adapter.")] = "auto",
    dtype: DtypeOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; default: the model's own.")] = None,
    inputs: Annotated[Path | None, typer.Option("--inputs", "-i", help=f"Example inputs. {INPUTS_HELP}")] = None,
    reserve: Annotated[list[str], typer.Option(help=RESERVE_HELP)] = [],  # noqa: B006  (the same)
    dynamic: Annotated[list[str], typer.Option(help=DYNAMIC_HELP)] = [],  # noqa: B006  (the same)
    cache: Annotated[
        bool, typer.Option("--cache", help="Keep keys and values, so that the model writes text.")
    ] = False,
    weights: Annotated[str | None, typer.Option(help="int8 or int4: quantise the base; onnxruntime, openvino.")] = None,
    head: Annotated[str | None, typer.Option(help="With --weights: int8 (default) or int4 for the output.")] = None,
    mixed: Annotated[
        bool | None,
        typer.Option("--mixed/--no-mixed", help="With --weights int4: first and last layers in 8 bits (default)."),
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option(help="With --weights: how codes are chosen: rtn (default), k_quant, gptq.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A text that gptq reads; default: texts that the model writes.")
    ] = None,
    capabilities: Annotated[str, typer.Option(help="For tensorrt: the GPUs' capabilities, as 8.6,8.9,12.0.")] = "",
    json: JsonOption = False,
) -> None:
    """Compile a model and its adapters, and save the result with the model's tokenizer."""
    import lorac

    room, choice = parse_reserve(reserve), active if active == "auto" else parse_choice(active)
    examples = None if inputs is None else read_inputs(inputs)
    with progress("compile") as steps:
        steps.step("loading the model")
        host, tokenizer = load_with_tokenizer(model)
        steps.step("compiling")
        compiled = lorac.compile(
            host,
            parse_adapters(adapter),
            target=target,
            mode=mode,
            active=choice,
            reserve=room,
            example_inputs=examples,
            dynamic_shapes=parse_dynamic_shapes(dynamic, host, examples),
            dtype=dtype,
            device=device,
            # Other targets have no such options, so only given ones are passed.
            **({"cache": True} if cache else {}),
            **({"weights": weights} if weights else {}),
            **({"head": head} if head else {}),
            **({} if mixed is None else {"mixed": mixed}),
            **({"algorithm": algorithm} if algorithm else {}),
            **({"calibration": read_calibration(calibration, tokenizer)} if calibration else {}),
            **({"target_capabilities": capabilities.split(",")} if capabilities else {}),
        )
        steps.step("saving")
        compiled.save(out, tokenizer)
    names = list(compiled.adapters)
    report = {"folder": str(out), "target": target, "mode": mode, "adapters": names, "active": compiled.active}
    line = f"{out}: {target}, {mode}, adapters {', '.join(names) or 'none'}, active {compiled.active}"
    print_report(report, line, as_json=json)


def explain(
    model: CompiledOrModel,
    adapter: AdapterOption = [],  # noqa: B006  (the same)
    mode: ModeOption = "auto",
    target: Annotated[
        str | None,
        typer.Option(help="Also list the ops that this target does not compute.", autocompletion=_TARGETS),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write a page with the picture of the graph.")
    ] = None,
    trust: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Explain how each adapter runs at each site, and why not in a cheaper way."""
    with progress("explain") as report:
        report.step("loading")
        compiled = load_compiled(model, adapter, trust=trust, mode=mode, active=None)
        explanation = compiled.explain(target)
    print_report(explanation, str(explanation), as_json=json)
    if html is not None:
        page = compiled.graph.to_html(html)
        if not json:
            print(f"{page}: the picture")


COMMANDS = (sites, variants, compile, explain)
