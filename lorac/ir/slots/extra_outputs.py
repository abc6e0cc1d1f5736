"""Extra outputs: what branches give through ``ctx.emit``, and how ``compiled.aux`` files it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorac.errors import OptionError, nearest_name
from lorac.ir.slots.plans import SitePlan


def record_extra_outputs(aux: dict[str, dict[str, Any]], path: str, emitted: Mapping[str, Sequence[Any]]) -> None:
    """Add one call's extra outputs to ``aux``, name -> site path -> tensor.

    Where several active branches of a site give an output of one name, the second is filed under ``<path>[1]``.
    """
    for name, tensors in emitted.items():
        for i, tensor in enumerate(tensors):
            aux.setdefault(name, {})[path if i == 0 else f"{path}[{i}]"] = tensor


def check_extra_outputs(aux: Sequence[str], plans: Iterable[SitePlan]) -> None:
    """Raise ``OptionError`` where an extra output is asked for that no branch gives."""
    known = {name for plan in plans for branch in plan.branches for name in branch.emits}
    for name in aux:
        if name not in known:
            raise OptionError(
                f"no adapter gives an extra output '{name}'",
                nearest=nearest_name(name, known),
                next_step=f"these do: {', '.join(sorted(known)) or 'none'}",
            )
