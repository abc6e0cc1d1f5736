"""Methods, initialisers, optimizers and rules, made from their names and keywords in a recipe."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

import lorac
from lorac import training
from lorac.errors import OptionError, nearest_name, not_one_of
from lorac.trainer.recipe import NamedSpec
from lorac.training import initialisation as starts
from lorac.training.rule import Rule
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

GROUP_SETTINGS = ("rank", "update_proj_gap", "scale", "proj_type")


def make_adapters(
    given: Mapping[str, Mapping[str, Any]], model: nn.Module, batches: Callable[[], Iterable[Any]]
) -> dict[str, Adapter | Variant]:
    """Make the adapters of a recipe: read from files, fresh, or initialised.

    Args:
        given: name -> what the recipe says of it.
        model: the base.
        batches: gives what a start sees.

    Raises:
        OptionError: there is no such method, start or keyword.
        LoracError: what reading, making and beginning one raise.
    """
    return {name: _make_adapter(name, dict(said), model, batches) for name, said in given.items()}


def make_optimizer(named: NamedSpec, compiled: Any, learning_rate: float) -> torch.optim.Optimizer:
    """Make the optimizer of the trainable parameters."""
    name, keywords = _split_spec(named, "the optimizer")
    own = {key: cls for key, cls in vars(training).items() if _is_strict_subclass(cls, torch.optim.Optimizer)}
    torchs = {key: cls for key, cls in vars(torch.optim).items() if _is_strict_subclass(cls, torch.optim.Optimizer)}
    known = {**torchs, **own}
    known.pop("Optimizer", None)
    if name not in known:
        raise not_one_of("there is no optimizer", name, sorted(known))
    if name in own:
        of_groups = {key: keywords.pop(key) for key in GROUP_SETTINGS if key in keywords}
        tensors: Any = training.galore_groups(compiled, **of_groups)
    else:
        tensors = [tensor for tensor in compiled.parameters() if tensor.requires_grad]
    made: torch.optim.Optimizer = _construct(known[name], name, (tensors,), {"lr": learning_rate, **keywords})
    return made


def make_rule(named: NamedSpec, compiled: Any, optimizer: torch.optim.Optimizer) -> Rule:
    """Attach the rule of a recipe to an optimizer."""
    name, keywords = _split_spec(named, "the rule")
    known = {key: cls for key, cls in vars(training).items() if _is_strict_subclass(cls, Rule)}
    if name not in known:
        raise not_one_of("there is no rule", name, sorted(known))
    made: Rule = _construct(known[name], name, (compiled, optimizer), keywords)
    return made


def _make_adapter(
    name: str, said: dict[str, Any], model: nn.Module, batches: Callable[[], Iterable[Any]]
) -> Adapter | Variant:
    if "path" in said:
        path = said.pop("path")
        if said:
            raise OptionError(
                f"adapter '{name}' has a path, and {', '.join(said)} besides", next_step="its file says what it is"
            )
        return lorac.load_adapter(path, model, name)
    method, start = said.pop("method", None), said.pop("start", None)
    known = lorac.variants()
    if method not in known:
        raise not_one_of(f"adapter '{name}': there is no method", method, known)
    variant: Variant = _construct(known[method], f"method {method}", (), said)
    if start is None:
        return variant
    begin, keywords = _split_spec(start, f"the start of '{name}'")
    begins = {
        key: cls
        for key, cls in vars(starts).items()
        if _is_strict_subclass(cls, starts.Initialiser) and cls is not starts.Initialiser
    }
    if begin not in begins:
        raise not_one_of(f"adapter '{name}': there is no start", begin, sorted(begins))
    begun: Adapter = _construct(begins[begin], begin, (), keywords)(variant, model, batches())
    return begun


def _split_spec(named: NamedSpec, what: str) -> tuple[str, dict[str, Any]]:
    """Split a spec into its name and keywords."""
    if isinstance(named, str):
        return named, {}
    keywords = dict(named)
    if not isinstance(keywords.get("name"), str):
        raise OptionError(f"{what} has no name", next_step="give {name: ..., and its keywords}")
    return keywords.pop("name"), keywords


def _is_strict_subclass(cls: object, kind: type) -> bool:
    return isinstance(cls, type) and issubclass(cls, kind) and cls is not kind


def _construct(cls: Any, name: str, given: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Made with keywords that it has."""
    known = [key for key in inspect.signature(cls).parameters][len(given) :]
    for key in keywords:
        if key not in known:
            nearest = nearest_name(key, known)
            raise OptionError(f"{name} has no {key}", nearest=nearest, next_step=f"it takes {', '.join(known)}")
    return cls(*given, **{key: tuple(value) if isinstance(value, list) else value for key, value in keywords.items()})
