"""Adapted layers: where the ``forward`` of a layer's class uses the weight, and hooks around it.

A scaled embedding returns a multiple of the result of ``nn.Embedding``. The change of an adapter of its weight is
scaled with it, as it is once merged.

A hook that changes the inputs or outputs of a layer is ambiguous there: PEFT's layer runs it on the base's product
alone, and on the adapted one once the adapter is merged. So it is refused; a hook that changes nothing is kept.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import SiteError
from lorac.frontend.copying import copy_structure
from lorac.frontend.quantised_weights import is_bitsandbytes_layer
from lorac.frontend.site_discovery import is_gpt2_conv1d
from lorac.ir.sites.site import ConvGeometry

Forward = Callable[..., Any]
Hook = Callable[..., object]
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_layer_class(module: nn.Module) -> type[nn.Module]:
    """Return the layer class among a module's bases."""
    known = _LAYERS if not is_gpt2_conv1d(module) else ()
    return next(cls for cls in type(module).__mro__ if cls in known or cls.__name__ == "Conv1D")


def check_layer(path: str, model: nn.Module) -> None:
    """Raise ``SiteError`` if a layer's class computes more than the layer by itself: no adapter can act there."""
    module = model.get_submodule(path)
    if not has_plain_forward(module) and not calls_super_forward(module):
        raise SiteError(
            f"'{path}' is a {type(module).__name__}, whose forward computes more than its layer by itself",
            next_step="exclude= it, or let its forward call super().forward",
        )


def has_plain_forward(module: nn.Module) -> bool:
    """Return whether a layer's forward is that of its layer class.

    A forward that calls no other is counted as such if it gives the same result, as Falcon's product without
    ``F.linear`` does.
    """
    if type(module).forward is find_layer_class(module).forward or is_bitsandbytes_layer(module):
        return True
    return not calls_super_forward(module) and _acts_as_linear(module)


def calls_super_forward(module: nn.Module) -> bool:
    """Return whether a layer's own forward calls ``super().forward``; a forward without code counts as one."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is None or "forward" in code.co_names


def replace_super_forward(module: nn.Module, forward: Forward) -> type[nn.Module]:
    """Make a subclass of the module's class whose ``super().forward`` is ``forward(*args, **kwargs)``."""
    cls, base = type(module), find_layer_class(module)
    below = type(base.__name__, (base,), {"forward": lambda self, *args, **kwargs: forward(*args, **kwargs)})
    return type(cls.__name__, (cls, below), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def pad_conv_input(x: Tensor, conv: ConvGeometry | None) -> Tensor:
    """Pad a convolution's input where its op cannot pad as its module does."""
    if conv is None or not conv.before:
        return x
    return F.pad(x, conv.before, mode="constant" if conv.mode == "zeros" else conv.mode)


@torch.no_grad()
def _acts_as_linear(module: nn.Module) -> bool:
    """Return whether a linear layer's own forward gives the result of ``nn.Linear`` on random numbers."""
    if not isinstance(module, nn.Linear) or module.weight.is_meta:
        return False
    drawn = torch.randn(3, module.in_features, generator=torch.Generator().manual_seed(0))
    x = drawn.to(module.weight)
    layer = copy_structure(module).eval()  # a forward may write attributes
    own, plain = type(layer).forward(layer, x), nn.Linear.forward(layer, x)
    return isinstance(own, Tensor) and own.shape == plain.shape and torch.allclose(own, plain, rtol=1e-3)


def guard_hooks(layer: nn.Module, path: str, is_adapted: Callable[[], bool] = lambda: True) -> None:
    """Make the forward hooks of a copy's layer raise where they change an adapted layer's input or output, in place.

    Args:
        path: of its site, for the message.
        is_adapted: whether an adapter acts on the running call.
    """
    for key, hook in layer._forward_pre_hooks.items():
        layer._forward_pre_hooks[key] = functools.partial(_run, hook, slice(1, None), path, is_adapted)
    for key, hook in layer._forward_hooks.items():
        layer._forward_hooks[key] = functools.partial(_run, hook, slice(-1, None), path, is_adapted)


def _run(hook: Hook, subject: slice, path: str, is_adapted: Callable[[], bool], *arguments: object) -> object:
    """Run a hook, and raise ``SiteError`` if it changes its subject.

    Args:
        subject: which of the arguments it may change: the inputs of the layer, or its output.
        path, is_adapted: as ``guard_hooks`` takes them.
        *arguments: those of the hook; the first is the layer.
    """
    before = pytree.tree_leaves(arguments[subject])
    writes = [_count_writes(leaf) for leaf in before]
    result = hook(*arguments)
    after = before if result is None else pytree.tree_leaves(result)
    same = len(after) == len(before) and all(one is other for one, other in zip(after, before, strict=True))
    if is_adapted() and not (same and writes == [_count_writes(leaf) for leaf in before]):
        name = getattr(hook, "__qualname__", type(hook).__name__)
        raise SiteError(
            f"the forward hook {name} of '{path}' changes what the layer takes or returns: PEFT runs it before the "
            "adapter's part is added, and after it once that is merged",
            next_step="register it on a module around the layer, or remove it and exclude= the layer",
        )
    return result


def _count_writes(value: object) -> int:
    """Return how often torch has written into a tensor; it counts nothing for one made in inference mode."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
