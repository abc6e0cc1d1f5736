"""A structural copy of a model: separate modules, flags and hooks; shared weight storage."""

import copy
import functools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorac.errors import CaptureError, translate_errors
from lorac.ir.slots.layouts import pad_rows

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)


def copy_structure(model: ModuleT, *, share_buffers: bool = False) -> ModuleT:
    """Copy a model module by module over the same weight storage, with every ``requires_grad`` off.

    Parameters become new ``nn.Parameter`` objects that share the host's storage, one per distinct parameter: ties stay
    ties, and flags set on the copy do not change the model. Parameters of other classes keep their class and
    attributes. Parameters without storage (torchao's, for example) are shared as objects.

    Args:
        model: the host; it is not changed.
        share_buffers: whether to share buffers too, for a copy that never trains (training writes batch statistics).

    Raises:
        CaptureError: an attribute of the model cannot be copied.
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
    step = "find the attribute that copy.deepcopy(model) fails on, and store it outside of the model"
    with translate_errors(CaptureError, f"{type(model).__name__} cannot be copied", next_step=step):
        copied = copy.deepcopy(model, memo)
    return copied


def _copy_parameter(parameter: nn.Parameter) -> Tensor:
    """Return a parameter over the same storage, whose data and attributes can be replaced.

    On their first call, bitsandbytes layers move attributes of their weights elsewhere and repack the data.
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
    """Give layers with several names a separate module at these paths of a copy, over the same weight.

    An adapter acts under its own name, as PEFT's layer does, which replaces only the first name. An entry in a list,
    tuple, set or dictionary of a module is such a name too.

    Args:
        model: the copy; changed in place.
        paths: paths of the layers.
        merging: whether to count only registered names, since other references to a layer use the merged weight of a
            checkpoint.

    Returns:
        The modules that remain under the other names.
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
    """Yield the modules in a container and in nested containers, once per reference; skip containers seen before."""
    if id(value) in seen or not isinstance(value, _CONTAINERS):
        return
    seen.add(id(value))
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, nn.Module):
            yield inner
        elif isinstance(inner, _CONTAINERS):
            yield from _iterate_modules(inner, seen)


def copy_layer(layer: nn.Module) -> nn.Module:
    """Return a module over the same tensors, whose tensors and hooks can be replaced separately."""
    own = copy.copy(layer)
    own.__dict__ |= {kept: vars(layer)[kept].copy() for kept in _KEPT_APART}
    return own


_KEPT_APART = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


class WeightCast(Exception):
    """An error for a forward that casts its own weights, which are constants in a program."""


def refuse_casts(host: nn.Module) -> None:
    """Make the modules of a copy raise ``WeightCast`` if a forward casts their tensors to another dtype."""

    def check(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for name, tensor in (*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)):
            wanted = change(tensor).dtype
            if wanted != tensor.dtype:
                raise WeightCast(f"it casts its own weight '{name}' from {tensor.dtype} to {wanted}")
        return module

    for module in host.modules():
        module._apply = functools.partial(check, module)  # type: ignore[method-assign]  # of a copy


def widen_layers(model: nn.Module, sizes: Mapping[str, int]) -> nn.Module:
    """Return a structural copy of a model in which some tensors are padded with rows of zeros.

    Args:
        sizes: name of a tensor -> its number of rows; names of one tensor share the new tensor.
    """
    copied, wide = copy_structure(model), dict[int, nn.Parameter]()
    for name, size in sizes.items():
        own, (owner, _, leaf) = copied.get_parameter(name), name.rpartition(".")
        wide.setdefault(id(own), nn.Parameter(pad_rows(own.detach(), size), requires_grad=False))
        copied.get_submodule(owner)._parameters[leaf] = wide[id(own)]
    return copied
