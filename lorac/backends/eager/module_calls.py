"""The modules of a copied model: calls outside of torch.compile's graphs or with other tensors, and their children.

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

from lorac.errors import Unavailable, list_some

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


class ChildModules:
    """The children of all modules of a copy, recorded when this object is built.

    PEFT, trainers with ``peft_config=``, and libraries that quantise or fuse layers replace a model's children in
    place. Programs are made from the original, so the base, the adapters, exports and artifacts of a compiled model
    would not contain the replacements.

    Args:
        model: the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(path, module) for path, module in model.named_modules() if module._modules]
        self._paths, self._now = [path for path, _ in named], [module._modules for _, module in named]
        self._first = [dict(children) for children in self._now]

    def check(self) -> None:
        """Refuse a copy whose children were replaced since; a wrapped child, as by ``torch.compile``, is allowed.

        Raises:
            Unavailable: naming the replaced children.
        """
        if self._now == self._first:  # compares identities, about 50 ns per module with children
            return
        replaced: dict[str, nn.Module | None] = {}
        for path, children, first in zip(self._paths, self._now, self._first, strict=True):
            for name, child in first.items():
                now = children.get(name)
                if child is None or now is child:
                    continue
                wraps = now is not None and any(one is child for one in now.modules())
                if now is None or not wraps or {*map(id, now.parameters())} != {*map(id, child.parameters())}:
                    replaced[f"{path}.{name}".removeprefix(".")] = now
        if not replaced:
            self._first = [dict(children) for children in self._now]
            return
        kinds = {
            "nothing" if child is None else f"{type(child).__module__.partition('.')[0]}'s {type(child).__name__}"
            for child in replaced.values()
        }
        raise Unavailable(
            f"{list_some(sorted(replaced), 3)} of a compiled model became {', '.join(sorted(kinds))}, but its "
            "adapters, exports and artifacts still use the old layers",
            next_step="change the original model and compile it again; for an adapter of PEFT's, give its folder or "
            "configuration in adapters=",
        )
