"""An optimizer as one of its steps sees it: with other parameter groups, and with other states.

torch passes the optimizer to ``step`` through its pre-hooks, so that a hook may give it a view. The optimizer's own
groups never change, also where the step raises.
"""

import functools
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from lorac.errors import ChoiceError

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
        members: the attributes of the view's own.

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
