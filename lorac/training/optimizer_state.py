"""An optimizer's state by the names of tensors, which torch keeps by the position of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lorac.errors import ChoiceError
from lorac.training.rule import unwrap_ddp, unwrap_optimizer

_TENSORS, _OPTIMIZER = "tensors", "optimizer"
_STEP = "compile with the adapters, and make the optimizer with the groups, of the run that is continued"


def optimizer_state(compiled: Any, optimizer: Any) -> dict[str, Any]:
    """Return the state of an optimizer and of its rules, with names of tensors in the place of positions.

    Args:
        compiled: the result of ``lorac.compile(..., target="eager")``, possibly wrapped in DDP.
        optimizer: holds tensors of its adapters.

    Returns:
        What ``optimizer.state_dict()`` returns, by the keys of ``compiled.state_dict()``; besides, the optimizer's
        class and the shape of every tensor. It holds tensors, numbers and texts in lists and dicts.

    Raises:
        ChoiceError: the optimizer holds a tensor that no adapter has.
    """
    optimizer = unwrap_optimizer(optimizer)
    names, state = _list_names(compiled, optimizer), optimizer.state_dict()
    return {
        **state,
        "state": {names[index]: entries for index, entries in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[index] for index in group["params"]]} for group in state["param_groups"]
        ],
        **_describe(optimizer, names),
    }


def load_optimizer_state(compiled: Any, optimizer: Any, state: Mapping[str, Any]) -> None:
    """Restore a state of ``optimizer_state``, each entry to the tensor of its name. Attach rules first, in their order.

    Args:
        compiled: as for ``optimizer_state``.
        optimizer: of the same class, with the same groups, in which tensors may have another order.
        state: what ``optimizer_state`` returned.

    Raises:
        ChoiceError: it is of another optimizer, of other tensors or of other groups; the message names the first
            difference.
    """
    optimizer = unwrap_optimizer(optimizer)
    names = _list_names(compiled, optimizer)
    _check_same(_describe(optimizer, names), state)
    named = {id(tensor): name for tensor, name in zip(_held_tensors(optimizer), names, strict=True)}
    own = [[named[id(tensor)] for tensor in group["params"]] for group in optimizer.param_groups]
    _check_groups(own, [group["params"] for group in state["param_groups"]])
    places = {name: index for index, name in enumerate(names)}
    groups = zip(own, state["param_groups"], strict=True)
    rest = {key: value for key, value in state.items() if key not in (_TENSORS, _OPTIMIZER)}
    positions = {
        "state": {places[name]: entries for name, entries in state["state"].items()},
        "param_groups": [{**saved, "params": [places[name] for name in held]} for held, saved in groups],
    }
    optimizer.load_state_dict({**rest, **positions})


def _check_groups(own: list[list[str]], saved: list[list[str]]) -> None:
    if len(own) != len(saved):
        raise ChoiceError(f"the state has {len(saved)} groups of tensors, the optimizer {len(own)}", next_step=_STEP)
    for number, (here, there) in enumerate(zip(own, saved, strict=True)):
        moved = {*here} ^ {*there}
        if moved:
            raise ChoiceError(f"'{min(moved)}' is in group {number} here or in the state, not in both", next_step=_STEP)


def _describe(optimizer: Any, names: list[str]) -> dict[str, Any]:
    shapes = {name: list(tensor.shape) for name, tensor in zip(names, _held_tensors(optimizer), strict=True)}
    return {_OPTIMIZER: type(optimizer).__name__, _TENSORS: shapes}


def _check_same(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    if own[_OPTIMIZER] != state[_OPTIMIZER]:
        raise ChoiceError(
            f"the state is of {state[_OPTIMIZER]}, and the optimizer is {own[_OPTIMIZER]}", next_step=_STEP
        )
    here, there = own[_TENSORS], state[_TENSORS]
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            shapes = ", and ".join(
                f"{where} it {'does not exist' if shape is None else f'has the shape {tuple(shape)}'}"
                for where, shape in (("in the state", there.get(name)), ("here", here.get(name)))
            )
            raise ChoiceError(f"the state is of other tensors: '{name}': {shapes}", next_step=_STEP)


def _list_names(compiled: Any, optimizer: Any) -> list[str]:
    """Return the names of an optimizer's tensors in their order, which numbers them in torch's state dict."""
    known = {id(tensor): name for name, tensor in unwrap_ddp(compiled).named_parameters()}
    held = _held_tensors(optimizer)
    foreign = next((tensor for tensor in held if id(tensor) not in known), None)
    if foreign is not None:
        raise ChoiceError(
            f"the optimizer holds a tensor of shape {tuple(foreign.shape)} that no adapter has",
            next_step="give it tensors of compiled.parameters() alone, and other tensors an optimizer of their own",
        )
    return [known[id(tensor)] for tensor in held]


def _held_tensors(optimizer: Any) -> list[torch.Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]
