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
from lorac.errors import LoracError, OptionError, nearest_name, not_one_of
from lorac.trainer.losses import LOSSES, AddedLoss
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
    own = _list_classes(training, torch.optim.Optimizer)
    torchs = _list_classes(torch.optim, torch.optim.Optimizer)
    torchs.pop("LBFGS", None)  # it takes a closure at each step
    name, keywords, kind = _look_up(named, "optimizer", {**torchs, **own})
    if name in own:
        of_groups = {key: keywords.pop(key) for key in GROUP_SETTINGS if key in keywords}
        tensors: Any = training.galore_groups(compiled, **of_groups)
    else:
        tensors = [tensor for tensor in compiled.parameters() if tensor.requires_grad]
    made: torch.optim.Optimizer = _construct(kind, name, (tensors,), {"lr": learning_rate, **keywords})
    return made


def make_rules(named: Sequence[NamedSpec], compiled: Any, optimizer: torch.optim.Optimizer) -> list[Rule]:
    """Attach the rules of a recipe to an optimizer, in their order.

    Raises:
        ChoiceError: two of them do not go together.
    """
    rules: list[Rule] = []
    for spec in named:
        name, keywords, kind = _look_up(spec, "rule", _list_classes(training, Rule))
        rules.append(_construct(kind, name, (compiled, optimizer), keywords))
        check_compatible(rules)
    return rules


def make_losses(named: Sequence[NamedSpec]) -> list[AddedLoss]:
    """Make what is added to the loss."""
    found = [_look_up(spec, "loss", LOSSES) for spec in named]
    return [_construct(kind, name, (), keywords) for name, keywords, kind in found]


def extra_outputs(named: Sequence[NamedSpec]) -> tuple[str, ...]:
    """Return the names of the extra outputs that losses read, for ``lorac.compile(..., aux=)``."""
    return tuple(sorted({loss.emitted for loss in make_losses(named) if loss.emitted is not None}))


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
    begins = _list_classes(starts, starts.Initialiser)
    begin, keywords, kind = _look_up(start, "start", begins, f"adapter '{name}': ")
    begun: Adapter = _construct(kind, begin, (), keywords)(variant, model, batches())
    return begun


def _look_up(
    named: NamedSpec, what: str, known: Mapping[str, type[Any]], where: str = ""
) -> tuple[str, dict[str, Any], type[Any]]:
    """Return the name of a spec, its keywords and the class of that name."""
    keywords = {"name": named} if isinstance(named, str) else dict(named)
    name = keywords.pop("name", None)
    if not isinstance(name, str):
        raise OptionError(f"{where}the {what} has no name", next_step="give {name: ..., and its keywords}")
    if name not in known:
        raise not_one_of(f"{where}there is no {what}", name, sorted(known))
    return name, keywords, known[name]


def _list_classes(module: object, kind: type) -> dict[str, type[Any]]:
    """Return the subclasses of a class that a module names."""
    return {
        name: cls
        for name, cls in vars(module).items()
        if isinstance(cls, type) and issubclass(cls, kind) and cls is not kind
    }


def _construct(cls: Any, name: str, given: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Make an object with keywords that it takes."""
    parameters = dict(list(inspect.signature(cls).parameters.items())[len(given) :])
    for key in keywords:
        if key not in parameters:
            nearest = nearest_name(key, parameters)
            raise OptionError(f"{name} has no {key}", nearest=nearest, next_step=f"it takes {', '.join(parameters)}")
    try:
        return cls(*given, **{key: _convert(key, item, parameters[key].default) for key, item in keywords.items()})
    except LoracError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise OptionError(f"{name} cannot be made: {error}", next_step=f"it takes {', '.join(parameters)}") from error


def _convert(key: str, item: Any, default: object) -> Any:
    """Return a value of a recipe as code gives it: a list as a tuple, and settings of an object as that object."""
    if isinstance(item, Mapping) and dataclasses.is_dataclass(default):
        return _construct(type(default), key, (), item)
    return tuple(item) if isinstance(item, list) else item
