"""Methods, initialisers, optimizers, rules and losses, made from their names and keywords in a recipe."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import lorac
from lorac import training
from lorac.argument_types import matches_type
from lorac.errors import LoracError, OptionError, nearest_name, not_one_of, short
from lorac.trainer import losses
from lorac.trainer.recipe import NamedSpec
from lorac.training import initialisation as starts
from lorac.training.rule import Rule, check_compatible
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
    own, torchs = (_list_classes(module, torch.optim.Optimizer) for module in (training, torch.optim))
    torchs.pop("LBFGS", None)  # it takes a closure at each step
    name, keywords, kind = _look_up(named, "optimizer", {**torchs, **own})
    tensors: Any = [tensor for tensor in compiled.parameters() if tensor.requires_grad]
    if name in own:
        of_groups = {key: keywords.pop(key) for key in GROUP_SETTINGS if key in keywords}
        tensors = training.galore_groups(compiled, **of_groups)
    made: torch.optim.Optimizer = _construct(kind, name, (tensors,), {"lr": learning_rate, **keywords})
    return made


def make_rules(named: Sequence[NamedSpec], compiled: Any, optimizer: torch.optim.Optimizer) -> list[Rule]:
    """Attach rules to an optimizer, in their order; raises ``ChoiceError`` if two do not go together."""
    rules: list[Rule] = []
    for spec in named:
        name, keywords, kind = _look_up(spec, "rule", _list_classes(training, Rule))
        rules.append(_construct(kind, name, (compiled, optimizer), keywords))
        check_compatible(rules)
    return rules


def make_losses(named: Sequence[NamedSpec]) -> dict[str, dict[str, Any]]:
    """Return name -> keywords of what is added to the loss."""
    found = {}
    for spec in named:
        name, keywords, known = _look_up(spec, "loss", losses.SETTINGS)
        _check_keywords(name, keywords, [*known])
        found[name] = {**known, **keywords}
        wrong = [key for key, value in keywords.items() if not matches_type(value, type(known[key]))]
        if wrong or found[name].get("draws", 2) < 2:
            key = wrong[0] if wrong else "draws"
            next_step = f"give a value such as {known[key]}"
            raise OptionError(f"{name} takes no {key}={short(keywords[key])}", next_step=next_step)
    return found


def extra_outputs(named: Sequence[NamedSpec]) -> tuple[str, ...]:
    """Return the names of the extra outputs that losses read, for ``lorac.compile(..., aux=)``."""
    return losses.extra_outputs(make_losses(named))


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
    begin, keywords, kind = _look_up(start, "start", _list_classes(starts, starts.Initialiser), f"adapter '{name}': ")
    begun: Adapter = _construct(kind, begin, (), keywords)(variant, model, batches())
    return begun


def _look_up(named: NamedSpec, what: str, known: Mapping[str, Any], where: str = "") -> tuple[str, dict[str, Any], Any]:
    """Return the name of a spec, its keywords and what has that name."""
    keywords = {"name": named} if isinstance(named, str) else dict(named)
    name = keywords.pop("name", None)
    if not isinstance(name, str):
        raise OptionError(f"{where}the {what} has no name", next_step="give {name: ..., and its keywords}")
    if name not in known:
        raise not_one_of(f"{where}there is no {what}", name, sorted(known))
    return name, keywords, known[name]


def _list_classes(module: object, kind: type) -> dict[str, type[Any]]:
    """Return the subclasses of a class that a module names."""
    found = ((name, cls) for name, cls in vars(module).items() if isinstance(cls, type) and cls is not kind)
    return {name: cls for name, cls in found if issubclass(cls, kind)}


def _check_keywords(name: str, keywords: Iterable[str], known: Sequence[str]) -> None:
    for key in keywords:
        if key not in known:
            nearest = nearest_name(key, known)
            raise OptionError(f"{name} has no {key}", nearest=nearest, next_step=f"it takes {', '.join(known)}")


def _construct(cls: Any, name: str, given: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Make an object with keywords that it takes: a list as a tuple, and settings of an object as that object."""
    parameters = dict(list(inspect.signature(cls).parameters.items())[len(given) :])
    _check_keywords(name, keywords, [*parameters])
    try:
        return cls(*given, **{key: _convert(key, item, parameters[key].default) for key, item in keywords.items()})
    except LoracError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise OptionError(f"{name} cannot be made: {error}", next_step=f"it takes {', '.join(parameters)}") from error


def _convert(key: str, item: Any, default: object) -> Any:
    if isinstance(item, Mapping) and dataclasses.is_dataclass(default):
        return _construct(type(default), key, (), item)
    return tuple(item) if isinstance(item, list) else item
