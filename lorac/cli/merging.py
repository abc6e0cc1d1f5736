"""Commands that put adapters together, or into a model's weights: merge."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorac.argument_types import Fields
from lorac.cli._models import load_model, parse_option
from lorac.cli._output import JsonOption, complete_names, print_report
from lorac.cli.adapters import FormatOption, ModelOption, OutOption, save
from lorac.errors import AdapterError, OptionError
from lorac.progress import progress
from lorac.storage.remote import NAME_FORMS, find_source, find_stem

if TYPE_CHECKING:
    from lorac.frontend.model_view import Model
    from lorac.merging.recipe import MergeRecipe
    from lorac.variants.adapter import Adapter

_FOLDER_HELP = "A folder saved by transformers or diffusers; the adapters go into its weights. Else into an adapter."
_ADAPTER_HELP = (
    f"PATH=WEIGHT or NAME=PATH=WEIGHT, {NAME_FORMS}, with weight 1 if there is none; may be given several times."
)
_OPTION_HELP = "KEY=VALUE, an option of the method, such as density=0.5; may be given several times."
_DEQUANTIZE_HELP = "Merge into the float values of MODEL's weights where they are quantised; the result is in floats."
_SUM = "cat"
"""The command's default way: the weighted sum, which can go into a model's weights for adapters of any methods."""


_METHODS = complete_names("lorac.merging.registry", "ways")


def merge(  # noqa: PLR0913, PLR0917  (an argument per option)
    out: OutOption,
    folder: Annotated[str, typer.Argument(help=_FOLDER_HELP, metavar="[MODEL]", show_default=False)] = "",
    adapter: Annotated[list[str], typer.Option("--adapter", "-a", help=_ADAPTER_HELP)] = [],  # noqa: B006  (typer's way to say "any number")
    method: Annotated[str, typer.Option(help="How; docs/ways.md lists the ways.", autocompletion=_METHODS)] = _SUM,
    option: Annotated[list[str], typer.Option("--set", "-s", help=_OPTION_HELP)] = [],  # noqa: B006  (the same)
    recipe: Annotated[Path | None, typer.Option(help="A YAML file in mergekit's words, in place of -a, -s.")] = None,
    model: ModelOption = "",
    format: FormatOption = "",
    dequantize: Annotated[bool, typer.Option("--dequantize", help=_DEQUANTIZE_HELP)] = False,
    json: JsonOption = False,
) -> None:
    """Merge adapters into the weights of MODEL, and write its folder; without MODEL into one adapter."""
    from lorac.merging.merged_checkpoint import merge_checkpoint
    from lorac.merging.stored_model import StoredModel

    given = _read_request(adapter, method, option, recipe)
    with progress("merge") as report:
        if folder:
            if given.method == _SUM and not given.options:
                made = merge_checkpoint(folder, given.adapters, out, given.weights, dequantize=dequantize)
            else:
                source = find_source(folder, "MODEL", OptionError)
                merged = _merge_adapters(given, StoredModel.open(source, dequantize=dequantize).view)
                made = merge_checkpoint(source, merged, out, dequantize=dequantize)
            mixed = ", ".join(f"{name}*{weight:g}" for name, weight in given.weights.items())
            contents = {"path": str(out), "method": given.method, "weights": given.weights, "merged": made.merged}
            rest = {"bytes": made.size, "left_out": made.left_out}
            line = f"{out}: {mixed} merged by {given.method} into {made.merged} tensors"
            print_report({**contents, **rest}, line, as_json=json)
            return
        if dequantize:
            raise OptionError("--dequantize is for merging into a model", next_step="give MODEL, its folder")
        report.step("reading")
        base = model or given.base_model
        host = load_model(base) if base else None
        merged = _merge_adapters(given, host)
        report.step("writing")
        save(merged, out, format, host, as_json=json)


def _merge_adapters(given: MergeRecipe, model: Model | None) -> Adapter:
    import lorac

    options: Fields = given.options
    return lorac.merge(given.adapters, given.method, given.weights, model, dtype=given.dtype, **options)


def _read_request(adapters: Sequence[str], method: str, options: Sequence[str], recipe: Path | None) -> MergeRecipe:
    """Return the arguments of a merge, from the command line or a recipe."""
    from lorac.merging.recipe import MergeRecipe, read_merge_recipe

    if bool(adapters) == (recipe is not None) or (recipe is not None and options):
        raise OptionError("adapters come from -a, or from --recipe", next_step="give one of the two")
    if recipe is not None:
        return read_merge_recipe(recipe)
    paths: dict[str, str] = {}
    weights: dict[str, float] = {}
    for spec in adapters:
        rest, weight = spec, 1.0
        if "=" in spec and not Path(spec).exists():  # an existing path has no weight
            before, _, last = spec.rpartition("=")
            with contextlib.suppress(ValueError):
                rest, weight = before, float(last)
            if rest == spec and Path(before.rpartition("=")[2]).exists():
                raise OptionError(f"-a {spec}: the weight '{last}' is not a number", next_step=f"write -a {before}=0.5")
        name, separator, path = rest.partition("=") if not Path(rest).exists() else ("", "", rest)
        if not separator:
            name, path = find_stem(rest), rest
        if name in paths:
            raise AdapterError(
                f"two adapters are called '{name}'", next_step="name them: -a NAME=PATH=WEIGHT", code="adapter_exists"
            )
        paths[name], weights[name] = path, weight
    return MergeRecipe(paths, method, weights, dict(map(parse_option, options)))


COMMANDS = (merge,)
