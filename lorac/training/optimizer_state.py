"""An optimizer's state by names of tensors, and views of an optimizer for single steps."""

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lorac.errors import ChoiceError
from lorac.training.rule import State, unwrap_ddp, unwrap_optimizer

_TENSORS, _OPTIMIZER = "tensors", "optimizer"
_STEP = "compile with the adapters, and make the optimizer with the groups, of the run that is continued"


def name_optimizer_state(compiled: nn.Module, optimizer: Optimizer) -> None:
    """Make ``optimizer.state_dict()`` and ``load_state_dict`` identify tensors by name instead of position.

    The names are the keys of ``compiled.state_dict()``. The state also holds the optimizer's class and each tensor's
    shape. ``load_state_dict`` raises ``ChoiceError`` for a state of another class, or of other tensors or groups.

    Args:
        compiled: the result of ``lorac.compile(..., target="eager")``, possibly wrapped in DDP.
        optimizer: holds tensors of its adapters; its rules are attached.

    Raises:
        ChoiceError: the optimizer holds a tensor that no adapter has.
    """
    optimizer = unwrap_optimizer(optimizer)
    _list_names(compiled, optimizer)
    optimizer.register_state_dict_post_hook(functools.partial(_name, compiled))
    optimizer.register_load_state_dict_pre_hook(functools.partial(_place, compiled))


def _name(compiled: nn.Module, optimizer: Optimizer, state: State) -> State:
    groups = _list_names(compiled, optimizer)
    names = [name for group in groups for name in group]
    named = [{**group, "params": own} for group, own in zip(state["param_groups"], groups, strict=True)]
    entries = {names[index]: entries for index, entries in state["state"].items()}
    return {**state, "state": entries, "param_groups": named, **_describe(optimizer, names)}


def _place(compiled: nn.Module, optimizer: Optimizer, state: State) -> State:
    groups = _list_names(compiled, optimizer)
    places = {name: index for index, name in enumerate(name for group in groups for name in group)}
    described = _describe(optimizer, [*places])
    if described[_OPTIMIZER] != state.get(_OPTIMIZER):
        there = state.get(_OPTIMIZER, "tensors by position")
        raise ChoiceError(f"the state belongs to {there}, the optimizer is {described[_OPTIMIZER]}", next_step=_STEP)
    here, there = described[_TENSORS], state[_TENSORS]
    name = next((name for name in sorted({*here, *there}) if here.get(name) != there.get(name)), None)
    if name is not None:
        shapes = f"'{name}' has the shape {there.get(name)} there, and {here.get(name)} here"
        raise ChoiceError(f"the state belongs to other tensors: {shapes}", next_step=_STEP)
    if [{*group} for group in groups] != [{*group["params"]} for group in state["param_groups"]]:
        raise ChoiceError("the groups of the optimizer hold other tensors than those of the state", next_step=_STEP)
    placed = [
        {**group, "params": [places[name] for name in own]}
        for group, own in zip(state["param_groups"], groups, strict=True)
    ]
    entries = {places[name]: entries for name, entries in state["state"].items()}
    rest = {key: value for key, value in state.items() if key not in (_TENSORS, _OPTIMIZER)}
    return {**rest, "state": entries, "param_groups": placed}


def _describe(optimizer: Optimizer, names: list[str]) -> State:
    tensors = (tensor for group in optimizer.param_groups for tensor in group["params"])
    shapes = {name: list(tensor.shape) for name, tensor in zip(names, tensors, strict=True)}
    return {_OPTIMIZER: type(optimizer).__name__, _TENSORS: shapes}


def _list_names(compiled: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Return the names of an optimizer's tensors, group by group."""
    known = {id(tensor): name for name, tensor in unwrap_ddp(compiled).named_parameters()}
    groups = [group["params"] for group in optimizer.param_groups]
    foreign = next((tensor for group in groups for tensor in group if id(tensor) not in known), None)
    if foreign is not None:
        raise ChoiceError(
            f"the optimizer holds a tensor of shape {tuple(foreign.shape)} that no adapter has",
            next_step="give it tensors of compiled.parameters() alone, and other tensors an optimizer of their own",
        )
    return [[known[id(tensor)] for tensor in group] for group in groups]


Group = dict[str, Any]


class GroupView(Group):
    """A parameter group as a step sees it; the step's writes into it also go into a store.

    Args:
        entries: of the group.
        store: the optimizer's own group, or a mapping that the caller keeps for the next view.
    """

    def __init__(self, entries: Mapping[str, Any], store: Group) -> None:
        super().__init__(entries)
        self._store = store

    def __setitem__(self, name: str, value: object) -> None:
        super().__setitem__(name, value)
        self._store[name] = value


def view_optimizer(optimizer: Optimizer, **members: object) -> Any:
    """Return an optimizer that shares all attributes with another one, but for its ``param_groups`` or ``state``.

    Args:
        optimizer: the other one.
        members: the attributes that only the view has.

    Raises:
        ChoiceError: the optimizer hands its step on to one inside it, which would not see the view.
    """
    inner = next((type(value) for value in vars(optimizer).values() if isinstance(value, Optimizer)), None)
    if inner is not None:
        raise ChoiceError(
            f"{type(optimizer).__name__} hands its step on to {inner.__name__}, which keeps groups of its own",
            next_step=f"attach the rule to that {inner.__name__}",
        )
    kind = type(optimizer)
    # Properties of a class hide entries of the shared __dict__.
    own = {name: property(functools.partial(_give, value)) for name, value in members.items()}
    view: Any = object.__new__(type(kind.__name__, (kind,), own))
    object.__setattr__(view, "__dict__", vars(optimizer))
    return view


def _give(value: object, view: object) -> object:
    return value
