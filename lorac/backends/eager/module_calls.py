"""Calls of a copied model's modules: outside of torch.compile's graphs, or with other tensors for one call.

A site's computation depends on the state of the model's call, which torch.compile cannot see. It would recompile the
same function for every site, up to its limit.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class OpaqueCall(Generic[T]):
    """A function that torch.compile does not trace, even inside a compiled module."""

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = self._plain = function

    def __call__(self, *args: object, **kwargs: object) -> T:
        """Call the function; this does not import torch's compiler, which a compiling caller has already imported."""
        if self._function is self._plain and "torch._dynamo" in sys.modules:
            self._function = torch.compiler.disable(self._plain)
        return self._function(*args, **kwargs)


def shadow(module: nn.Module, replaced: Mapping[str, Tensor]) -> nn.Module:
    """Return a shallow copy of a module with the forward of its class, and with some tensors replaced.

    It replaces weights that a module's own forward reads.

    Args:
        module: the module whose attributes are shared.
        replaced: name of a parameter or buffer in the module (``out_proj.weight``) -> its replacement.
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
