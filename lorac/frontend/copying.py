"""A structural copy of a model: own modules, flags and hooks; shared weight storage."""

import copy
import functools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorac.errors import CaptureError
from lorac.ir.slots.layer_sizes import pad_rows

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)


def copy_structure(model: ModuleT, *, share_buffers: bool = False) -> ModuleT:
    """Copy a model module by module over the same weight storage, with every ``requires_grad`` off.

    Parameters become new ``nn.Parameter`` objects that share the host's storage, one per distinct parameter: ties stay
    ties, and flags set on the copy leave the model unchanged. Parameters of a class of their own keep it, and their
    attributes. Those that have no storage (torchao's, say) are shared themselves.

    Args:
        model: the host; not touched.
        share_buffers: share buffers too, for a copy that will never train (batch statistics are written in training).

    Raises:
        CaptureError: something that the model holds cannot be copied.
    """
    shared: list[object] = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor | torch.Generator)
    ]
    if share_buffers:
        shared.extend(model.buffers())
    memo = {id(value): value for value in shared}
    for parameter in model.parameters():
        memo.setdefault(id(parameter), _copy_parameter(parameter))
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # objects that a model holds may raise anything when they are copied
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {error}",
            next_step="find the attribute that copy.deepcopy(model) fails on, and store it outside of the model",
        ) from error


def _copy_parameter(parameter: nn.Parameter) -> Tensor:
    """Return a parameter over the same storage, which may be given other data and attributes.

    Layers of bitsandbytes move attributes of their weights elsewhere when they are called first, and repack the data.
    """
    cls = type(parameter)
    if cls is nn.Parameter:
        return nn.Parameter(parameter.detach(), requires_grad=False)
    if cls.__torch_dispatch__ is not Tensor.__torch_dispatch__ or cls.__module__.startswith("torch."):
        return parameter
    with torch._C.DisableTorchFunctionSubclass():
        own = Tensor._make_subclass(cls, parameter.detach(), False)
    shared = (Tensor, nn.Module)
    own.__dict__ |= {n: v if isinstance(v, shared) else copy.copy(v) for n, v in vars(parameter).items()}
    return own


def separate_layers(model: nn.Module, paths: Iterable[str], *, merging: bool = False) -> list[nn.Module]:
    """Give layers of a copy that are reached by several names a module of their own at these paths, over one weight.

    An adapter acts under the name that it is for, as PEFT's layer does, which takes the place of the first name alone.
    A place in a list, tuple, set or dictionary of a module is such a name too.

    Args:
        model: the copy; changed in place.
        paths: paths of the layers.
        merging: count names alone, since what holds a layer besides has its merged weight in a checkpoint.

    Returns:
        The modules that stay under the other names.
    """
    held = (module._modules if merging else vars(module) for module in model.modules())
    names = Counter(id(child) for values in held for child in _iterate_modules(values, set()))
    left = []
    for path in paths:
        owner, _, leaf = path.rpartition(".")
        modules = model.get_submodule(owner)._modules
        layer = modules[leaf]
        assert layer is not None
        if names[id(layer)] > 1:
            modules[leaf] = copy_layer(layer)
            left.append(layer)
    return left


def _iterate_modules(value: object, seen: set[int]) -> Iterator[nn.Module]:
    """Yield the modules in a container and in those inside it, once for each place; skip containers seen before."""
    if id(value) in seen or not isinstance(value, _CONTAINERS):
        return
    seen.add(id(value))
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, nn.Module):
            yield inner
        elif isinstance(inner, _CONTAINERS):
            yield from _iterate_modules(inner, seen)


def copy_layer(layer: nn.Module) -> nn.Module:
    """Return a module over the same tensors that may be given others, and hooks, of its own."""
    own = copy.copy(layer)
    own.__dict__ |= {kept: vars(layer)[kept].copy() for kept in _KEPT_APART}
    return own


_KEPT_APART = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


class WeightCast(Exception):
    """Signals that a forward casts its own weights, which are constants of a program."""


def refuse_casts(host: nn.Module) -> None:
    """Make the modules of a copy raise ``WeightCast`` where a forward converts their tensors to another dtype."""
    for module in host.modules():
        module._apply = functools.partial(_check_cast, module)  # type: ignore[method-assign]  # of a copy


def _check_cast(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Return a module that its own forward converts (``to``, ``float``); its tensors must have the dtype already."""
    for name, tensor in (*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)):
        wanted = change(tensor).dtype
        if wanted != tensor.dtype:
            raise WeightCast(f"it casts its own weight '{name}' from {tensor.dtype} to {wanted}")
    return module


def widen_layers(model: nn.Module, sizes: Mapping[str, int]) -> nn.Module:
    """Return a structural copy of a model in which some tensors have more rows, of zeros.

    Args:
        sizes: name of a tensor -> its number of rows; names that share a tensor share the new one.
    """
    copied, wide = copy_structure(model), dict[int, nn.Parameter]()
    for name, size in sizes.items():
        own, (owner, _, leaf) = copied.get_parameter(name), name.rpartition(".")
        wide.setdefault(id(own), nn.Parameter(pad_rows(own.detach(), size), requires_grad=False))
        copied.get_submodule(owner)._parameters[leaf] = wide[id(own)]
    return copied
