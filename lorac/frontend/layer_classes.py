"""Adapted layers: how a layer's code uses the weight and changes the result, and hooks of the layer.

A layer may have a ``forward`` of its own. PEFT's layer applies it to the base's product only, and to the adapted
product once the adapter is merged. Where the two results differ, the adapter is refused. Where they agree, as in an
embedding that multiplies by ``embed_scale``, which PEFT reads too, an adapter acts on the inner weight; the same holds
where PEFT's layer raises an error, as for a convolution that pads its input.

A hook that changes the inputs or outputs of a layer is ambiguous in the same way, and is refused; a hook that changes
nothing is kept.
"""

import functools
import inspect
import math
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
    """Raise ``SiteError`` if a layer's own code changes the layer's input or output."""
    module = model.get_submodule(path)
    inside = calls_super_forward(module)
    if not _is_ordinary(module) and not _adds_changes(module, inside):
        raise _refuse_change(
            f"the forward of '{path}', a {type(module).__name__},",
            "move the change into a module around the layer, or add the layer to exclude=",
        )


def _refuse_change(subject: str, step: str) -> SiteError:
    return SiteError(
        f"{subject} changes inputs or outputs of the layer: PEFT runs it before it adds the adapter's part, but after "
        "a merged part",
        next_step=step,
    )


def has_plain_forward(module: nn.Module) -> bool:
    """Return whether a module's class computes the same as its layer class.

    A forward that does not call ``super().forward`` counts if it gives the same result, as Falcon's product without
    ``F.linear`` does.
    """
    return _is_ordinary(module, of_class=True) or (not calls_super_forward(module) and _adds_changes(module, False))


def _is_ordinary(module: nn.Module, *, of_class: bool = False) -> bool:
    """Return whether a layer runs the code of its layer class, or of a library with a quantised weight.

    Args:
        module: the layer.
        of_class: whether to ignore a forward on the instance.
    """
    if is_bitsandbytes_layer(module):
        return True
    cls, base, own = type(module), find_layer_class(module), vars(module)
    replaced = "forward" in own and "_old_forward" not in own  # accelerate's hooks call the original
    same = all(
        getattr(cls, name, None) is getattr(base, name, None) for name in ("forward", "__call__", "_conv_forward")
    )
    return same and (of_class or not replaced)


def calls_super_forward(module: nn.Module) -> bool:
    """Return whether a layer's own forward calls ``super().forward``; a forward without Python code counts."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is None or {"super", "forward"} <= {*code.co_names}


def replace_super_forward(module: nn.Module, forward: Forward) -> type[nn.Module]:
    """Return a subclass of the module's class in which ``super().forward`` is ``forward(*args, **kwargs)``."""
    cls, base = type(module), find_layer_class(module)
    below = type(base.__name__, (base,), {"forward": lambda self, *args, **kwargs: forward(*args, **kwargs)})
    return type(cls.__name__, (cls, below), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


def pad_conv_input(x: Tensor, conv: ConvGeometry | None) -> Tensor:
    """Pad a convolution's input, for padding that its op does not support."""
    if conv is None or not conv.before:
        return x
    return F.pad(x, conv.before, mode="constant" if conv.mode == "zeros" else conv.mode)


@torch.no_grad()
def _adds_changes(module: nn.Module, inside: bool) -> bool:
    """Test whether a change of a layer's product is added to the layer's output, as in PEFT.

    Args:
        module: the layer; its product is doubled as the change.
        inside: whether ``super().forward`` is replaced to return the product; else the layer's output must be the
            product.
    """
    weight = module.weight
    if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
        return inside
    if isinstance(module, nn.Embedding) and not (inside and module.max_norm is None):
        return inside  # ids with another meaning may have rows elsewhere; max_norm writes into the weight
    layer, base = copy_structure(module).eval(), find_layer_class(module)  # forward may write attributes
    layer._forward_hooks.clear()
    layer._forward_pre_hooks.clear()
    convolve = getattr(base, "_conv_forward", None)

    def multiply(x: Tensor, times: int = 1) -> Tensor:
        product = convolve(layer, x, layer.weight, layer.bias) if convolve else base.forward(layer, x)
        return times * product

    if isinstance(module, nn.Embedding):
        x = torch.tensor([[0, 1], [1, 0]], device=weight.device) % module.num_embeddings
    else:
        sizes: list[int] = []
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):  # for two positions of a kernel, three if it pads
            geometry = zip(module.kernel_size, module.stride, module.dilation, strict=True)
            sizes = [dilation * (kernel - 1) + 2 * stride for kernel, stride, dilation in geometry]
        width: Any = module.in_channels if sizes else module.nx if is_gpt2_conv1d(module) else module.in_features
        x = torch.randn(3, width, *sizes, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        found, expected = layer(x), multiply(x)
        if inside:
            expected = found + getattr(module, "embed_scale", 1) * expected
            layer.__class__ = replace_super_forward(layer, functools.partial(multiply, times=2))
            found = layer(x)
        difference = (found - expected).abs().max() if found.shape == expected.shape else math.inf
    except Exception:  # PEFT's layer does not support more arguments or results than one tensor either
        return inside
    return bool(difference <= max(1e-3, 8 * torch.finfo(weight.dtype).eps) * expected.abs().max())


def guard_hooks(layer: nn.Module, path: str, is_adapted: Callable[[], bool] = lambda: True) -> None:
    """Make the forward hooks of a copy's layer raise if they change an adapted layer's input or output; in place.

    Args:
        path: the site's path, for the message.
        is_adapted: function that returns whether an adapter acts on the running call.
    """
    for key, hook in layer._forward_pre_hooks.items():
        layer._forward_pre_hooks[key] = functools.partial(_run, hook, slice(1, None), path, is_adapted)
    for key, hook in layer._forward_hooks.items():
        layer._forward_hooks[key] = functools.partial(_run, hook, slice(-1, None), path, is_adapted)


def _run(hook: Hook, subject: slice, path: str, is_adapted: Callable[[], bool], *arguments: object) -> object:
    """Run a hook; raise ``SiteError`` if it changes ``arguments[subject]``.

    Args:
        subject: slice of the arguments to compare: the inputs of the layer, or its output.
        path, is_adapted: as ``guard_hooks`` takes them.
        *arguments: the hook's arguments; the first is the layer.
    """
    before = pytree.tree_leaves(arguments[subject])
    writes = [_count_writes(leaf) for leaf in before]
    result = hook(*arguments)
    after = before if result is None else pytree.tree_leaves(result)
    same = len(after) == len(before) and all(one is other for one, other in zip(after, before, strict=True))
    if is_adapted() and not (same and writes == [_count_writes(leaf) for leaf in before]):
        name = getattr(hook, "__qualname__", type(hook).__name__)
        raise _refuse_change(
            f"the forward hook {name} of '{path}'",
            "register it on a module around the layer, or remove it and add the layer to exclude=",
        )
    return result


def _count_writes(value: object) -> int:
    """Return torch's number of writes to a tensor; 0 for a tensor made in inference mode."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
