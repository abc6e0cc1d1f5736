"""A module over other tensors for one call, which replaces weights that a module reads in its own forward."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn


def shadow(module: nn.Module, replaced: Mapping[str, Tensor]) -> nn.Module:
    """Return a module with the same attributes but its class's own forward and some other tensors.

    Args:
        module: whose attributes it shares.
        replaced: what takes the place of a parameter or buffer, by its name in the module (``out_proj.weight``).
    """
    inside: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in replaced.items():
        child, _, rest = name.partition(".")
        inside[child] |= {rest: tensor} if rest else {}
    made = copy.copy(module)
    made.__dict__ = {name: value for name, value in vars(module).items() if name != "forward"}
    for kept in ("_parameters", "_buffers"):
        made.__dict__[kept] = {name: replaced.get(name, own) for name, own in vars(module)[kept].items()}
    children = vars(module)["_modules"].items()
    made.__dict__["_modules"] = {
        name: shadow(child, inside[name]) if inside.get(name) else child for name, child in children
    }
    return made
