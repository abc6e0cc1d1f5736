"""Weights that a host computes anew at each call: parametrizations, and the hooks of weight_norm and its kin.

A layer multiplies by what comes of them, so that is what its site shows and what adapters change. A compilation works
on a copy of such a host in which they are plain parameters; the host stays as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lorac.frontend.copying import copy_structure

_PARAMETRIZATIONS = "parametrizations"
"""What torch calls the child of a module that holds its parametrizations."""
_HOOKS: dict[type, tuple[str, ...]] = {
    WeightNorm: ("_g", "_v"),
    SpectralNorm: ("_orig", "_u", "_v"),
    prune.BasePruningMethod: ("_orig", "_mask"),
}
"""torch's hooks that set a weight before each call -> what they add to its name for what they make it from."""


@dataclass(frozen=True)
class _ComputedTensor:
    """A tensor of a module that is computed at each call.

    Attributes:
        leaf: its name in the module.
        value: computes it as in eval mode, leaving the module as it was.
        made_from: names of the tensors of the module that nothing else reads.
        hook: the key of the forward pre-hook that sets it; None for a parametrization.
    """

    leaf: str
    value: Callable[[], Tensor]
    made_from: Collection[str] = ()
    hook: int | None = None


def read_module_tensor(module: nn.Module, leaf: str) -> Any:
    """An attribute of a module; a tensor that it computes as the module would now, in eval mode, without a trace."""
    found = {computed.leaf: computed for computed in _find_computed_tensors(module)}
    return found[leaf].value() if leaf in found else getattr(module, leaf, None)


def get_tensor_identity(module: nn.Module, leaf: str) -> int:
    """What tells a tensor of a module from all others, also where it is computed at each call."""
    if parametrize.is_parametrized(module, leaf):
        return id(module._modules[_PARAMETRIZATIONS]._modules[leaf])  # type: ignore[union-attr]  # it is parametrized
    return id(getattr(module, leaf))


def is_inside_parametrization(path: str, model: nn.Module) -> bool:
    """Whether a path leads into what computes a weight, which is no layer of the model."""
    owner, found, _ = path.partition(f".{_PARAMETRIZATIONS}.")
    return bool(found) and parametrize.is_parametrized(model.get_submodule(owner))


def materialize_weights(model: nn.Module) -> nn.Module:
    """The model, or a structural copy where it computes weights at each call: there they are parameters.

    Each is what it comes to now, in eval mode. None needs a gradient, as what comes of a computation without one.
    """
    if not any(True for module in model.modules() for _ in _find_computed_tensors(module)):
        return model
    copy = copy_structure(model, share_buffers=True)
    for name, parameter in model.named_parameters():
        copy.get_parameter(name).requires_grad_(parameter.requires_grad)
    for module in list(copy.modules()):
        _make_plain(module)
    return copy


def _make_plain(module: nn.Module) -> None:
    """Put what the computed tensors of a module of a copy come to in their places."""
    found = [(computed, computed.value()) for computed in _find_computed_tensors(module)]
    if parametrize.is_parametrized(module):
        del module._modules[_PARAMETRIZATIONS]
        module.__class__ = type(module).__bases__[0]
    for computed, value in found:
        if computed.hook is not None:
            del module._forward_pre_hooks[computed.hook]
        for name in (*computed.made_from, computed.leaf):
            module.__dict__.pop(name, None)
            module._parameters.pop(name, None)
            module._buffers.pop(name, None)
        module.register_parameter(computed.leaf, nn.Parameter(value, requires_grad=False))


def _find_computed_tensors(module: nn.Module) -> Iterator[_ComputedTensor]:
    if parametrize.is_parametrized(module):
        lists = module._modules[_PARAMETRIZATIONS]
        assert isinstance(lists, nn.ModuleDict)
        for leaf, made in lists.items():
            yield _ComputedTensor(leaf, functools.partial(_evaluate_parametrization, made))
    for key, hook in module._forward_pre_hooks.items():
        kind = next((kind for kind in _HOOKS if isinstance(hook, kind)), None)
        if kind is not None:
            leaf = str(hook._tensor_name if kind is prune.BasePruningMethod else hook.name)  # type: ignore[attr-defined]  # its class has it
            yield _ComputedTensor(
                leaf,
                functools.partial(_evaluate_weight_hook, module, hook),
                [f"{leaf}{ending}" for ending in _HOOKS[kind]],
                key,
            )


@torch.no_grad()
def _evaluate_parametrization(made: nn.Module) -> Tensor:
    """What a parametrization comes to; a copy is asked, since in training mode some write into their buffers."""
    value = copy_structure(made).eval()()
    assert isinstance(value, Tensor)
    return value


@torch.no_grad()
def _evaluate_weight_hook(module: nn.Module, hook: Any) -> Tensor:
    """What a hook would set."""
    if isinstance(hook, prune.BasePruningMethod):
        value = hook.apply_mask(module)
    elif isinstance(hook, SpectralNorm):
        value = hook.compute_weight(module, do_power_iteration=False)
    else:
        value = hook.compute_weight(module)
    assert isinstance(value, Tensor)
    return value
