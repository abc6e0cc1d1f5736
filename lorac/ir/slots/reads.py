"""Program values: what a branch may read through ``ctx.value``, by name.

    =================  ================================================================================================
    name               value
    =================  ================================================================================================
    ``<path>``         the output of that site (a layer or a block) in this pass, adapted as it is; of several calls
                       the latest one
    ``base:<path>``    its output in a pass of the unadapted model over the same inputs, without gradients
    ``weight:<path>``  its base weight W (out, in)
    =================  ================================================================================================

Of a block that returns several tensors the first counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lorac.errors import SiteNotFound, nearest_name
from lorac.ir.host.sites import Site
from lorac.ir.slots.site import SitePlan

BASE, WEIGHT = "base", "weight"


def parse(name: str) -> tuple[str, str]:
    """(kind, site path) of a value's name; the kind is ``""``, ``"base"`` or ``"weight"``."""
    kind, colon, path = name.partition(":")
    return (kind, path) if colon else ("", name)


def check_reads(names: Iterable[str], sites: Mapping[str, Site]) -> None:
    """Raise ``SiteNotFound`` where a name is no value of the program."""
    for name in names:
        kind, path = parse(name)
        if kind not in {"", BASE, WEIGHT} or path not in sites or (kind == WEIGHT and sites[path].weight is None):
            raise SiteNotFound(
                f"'{name}' is no value of the program",
                nearest=nearest_name(path, sites),
                next_step="values are named <site>, base:<site> or weight:<site>; lorac.sites(model) lists the sites",
            )


def names_read(plans: Iterable[SitePlan]) -> list[str]:
    """Every value that the branches of the plans read."""
    return list(dict.fromkeys(name for plan in plans for branch in plan.branches for name in branch.reads))


def tapped(plans: Iterable[SitePlan]) -> list[str]:
    """Paths of the sites whose outputs are read."""
    parsed = [parse(name) for name in names_read(plans)]
    return list(dict.fromkeys(path for kind, path in parsed if kind != WEIGHT))


def presented(values: Mapping[str, torch.Tensor], sites: Mapping[str, Site]) -> dict[str, torch.Tensor]:
    """Values as formulas see them: stored weights as matrices (out, in)."""
    return {
        name: sites[path].present(value) if kind == WEIGHT else value
        for name, value in values.items()
        for kind, path in [parse(name)]
    }


def first_tensor(tree: Any) -> torch.Tensor:
    """The first tensor in a module's arguments or output: what a block reads and gives."""
    return next(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def replace_first(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same output with its first tensor changed; the kind of output stays."""
    leaves, spec = pytree.tree_flatten(tree)
    index = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    leaves[index] = change(leaves[index])
    return pytree.tree_unflatten(leaves, spec)
