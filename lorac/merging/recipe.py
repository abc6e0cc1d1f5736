"""Merge recipes: YAML with mergekit's keys.

merge_method: ties
base_model: path/to/model            # only where the way needs it
adapters:                            # or models:
  - adapter: path/to/sql             # a path or a name; or model: BASE+ADAPTER, as mergekit writes it
    parameters: {weight: 0.7, density: 0.5}
  - adapter: path/to/chat
    parameters: {weight: 0.3}
parameters: {normalize: true, lambda: 1.0}
dtype: float16
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from lorac.argument_types import describe_value, matches_type
from lorac.errors import OptionError, WrongType, check_known, not_one_of
from lorac.merging.registry import find_way, option_defaults
from lorac.storage.paths import parse_path
from lorac.storage.remote import find_stem
from lorac.storage.strict_json import Json, JsonObject
from lorac.storage.strict_yaml import read_yaml

_EXAMPLE = "docs/merging.md shows a recipe"
_FIELDS = ("merge_method", "base_model", "adapters", "models", "parameters", "dtype")
_RENAMED: Mapping[str, str] = {"lambda": "scale"}
"""mergekit's parameter -> lorac's option with the same meaning."""
_IRRELEVANT = {"int8_mask"}
"""mergekit's parameters that change no result."""
_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class MergeRecipe:
    """The arguments of ``lorac.merge``, with paths instead of objects.

    Attributes:
        adapters: name -> path.
        method: the name of a way.
        weights: name -> weight.
        options: options of the way; by adapter name where the recipe gives them per adapter.
        base_model: the path of the model, or None.
        dtype: dtype of the result, or None.
    """

    adapters: Mapping[str, str]
    method: str
    weights: Mapping[str, float]
    options: Mapping[str, object]
    base_model: str | None = None
    dtype: torch.dtype | None = None


def read_merge_recipe(path: str | os.PathLike[str]) -> MergeRecipe:
    """Read a merge recipe from a YAML file.

    Raises:
        OptionError, WrongType: the file cannot be read, or has unknown fields, adapters or parameters.
        FormatError: reading it takes too long.
    """
    file = parse_path(path, "the recipe", OptionError)
    given = read_yaml(file, next_step=_EXAMPLE)
    check_known(given, _FIELDS, f"'{file}': a recipe of merging has no field")
    method = _read_text(file, given, "merge_method") or ""
    try:
        defaults = option_defaults(find_way(method))
    except OptionError as error:
        raise OptionError(f"'{file}': {error.what}", nearest=error.nearest, next_step=error.next_step) from error
    entries = _read_entries(file, given)
    common = _read_parameters(file, given.get("parameters", {}), method)
    own = {name: _read_parameters(file, entry.get("parameters", {}), method) for name, entry in entries.items()}
    weights = {name: _read_weight(file, {**common, **parameters}) for name, parameters in own.items()}
    options = {name: value for name, value in common.items() if name != "weight"}
    for name in {name: None for parameters in own.values() for name in parameters if name != "weight"}:
        shared = options.get(name, defaults[name])  # an option that an adapter overrides is given for each adapter
        options[name] = {adapter: parameters.get(name, shared) for adapter, parameters in own.items()}
    base_model, dtype = _read_text(file, given, "base_model"), _read_text(file, given, "dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise not_one_of(f"'{file}': there is no dtype", dtype, _DTYPES)
    return MergeRecipe(
        {name: entry["path"] for name, entry in entries.items()},
        method,
        weights,
        options,
        base_model,
        None if dtype is None else getattr(torch, dtype),
    )


def _read_entries(file: Path, given: JsonObject) -> dict[str, JsonObject]:
    """Return name -> the recipe's entry, with its path."""
    if ("adapters" in given) == ("models" in given):
        raise OptionError(f"'{file}' needs one list of adapters, named 'adapters' or 'models'", next_step=_EXAMPLE)
    entries = given.get("adapters", given.get("models"))
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise WrongType(f"'{file}': the adapters are {describe_value(entries)}", next_step=f"{_EXAMPLE}, with a list")
    found: dict[str, JsonObject] = {}
    for entry in entries:
        check_known(entry, ("adapter", "model", "name", "parameters"), f"'{file}': an adapter of a recipe has no field")
        text = _read_text(file, entry, "adapter") or _read_text(file, entry, "model")
        if text is None:
            raise OptionError(f"'{file}' has an adapter without a path", next_step="give adapter: <path>")
        path = text if Path(text).exists() else text.rpartition("+")[2]
        name = _read_text(file, entry, "name") or find_stem(path)
        if name in found:
            raise OptionError(f"'{file}' has two adapters called '{name}'", next_step="give one of them a name:")
        found[name] = {**entry, "path": path}
    return found


def _read_parameters(file: Path, given: Json, method: str) -> dict[str, object]:
    """Return parameters under the names of the way's options, and the weight."""
    if not isinstance(given, dict):
        raise WrongType(f"'{file}': parameters is {describe_value(given)}", next_step=_EXAMPLE)
    known = {"weight", *_RENAMED, *_IRRELEVANT, *option_defaults(find_way(method))}
    check_known(given, sorted(known), f"'{file}': merge_method {method} has no field")
    for name, value in given.items():
        if isinstance(value, Mapping | list):
            raise OptionError(
                f"'{file}': {name} differs by layer, and merging takes one value for all",
                next_step="give one value for each adapter",
            )
    return {_RENAMED.get(name, name): value for name, value in given.items() if name not in _IRRELEVANT}


def _read_weight(file: Path, parameters: Mapping[str, object]) -> float:
    weight = parameters.get("weight", 1.0)
    if not matches_type(weight, float):
        raise WrongType(f"'{file}': weight is {describe_value(weight)}", next_step="write a number there")
    return float(weight)  # type: ignore[arg-type]  # it is a number


def _read_text(file: Path, given: Mapping[str, object], name: str) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise WrongType(f"'{file}': {name} is {describe_value(value)}", next_step="write a string there")
    return value
