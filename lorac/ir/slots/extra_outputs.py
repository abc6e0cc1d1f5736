"""Extra outputs: tensors that branches give by ``ctx.emit``, as ``compiled.aux`` holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from lorac.errors import OptionError, nearest_name
from lorac.ir.slots.plans import SitePlan

T = TypeVar("T")


def record_extra_outputs(aux: dict[str, dict[str, T]], path: str, emitted: Mapping[str, Sequence[T]]) -> None:
    """Add one call's extra outputs to ``aux``, name -> site path -> tensor.

    If several active branches of a site give an output of the same name, the second has the key ``<path>[1]``.
    """
    for name, tensors in emitted.items():
        for i, tensor in enumerate(tensors):
            aux.setdefault(name, {})[path if i == 0 else f"{path}[{i}]"] = tensor


def check_extra_outputs(aux: Sequence[str], plans: Iterable[SitePlan]) -> None:
    """Raise ``OptionError`` for a requested extra output that no branch gives."""
    known = {name for plan in plans for branch in plan.branches for name in branch.emits}
    for name in aux:
        if name not in known:
            raise OptionError(
                f"no adapter gives the extra output '{name}'",
                nearest=nearest_name(name, known),
                next_step=f"there are: {', '.join(sorted(known)) or 'none'}",
            )
