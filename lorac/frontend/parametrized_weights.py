"""Weights that a host computes at each call, by parametrizations or hooks such as weight_norm's.

Sites present the computed weight, by which the layer multiplies, and adapters change this weight. A compilation uses a
copy of such a host in which the computed weights are plain parameters; the host is not changed.
"""

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
from lorac.frontend.host import Host

_PARAMETRIZATIONS = "parametrizations"
"""torch's name for the child module that contains a module's parametrizations."""
_HOOKS: dict[type, tuple[str, ...]] = {
    WeightNorm: ("_g", "_v"),
    SpectralNorm: ("_orig", "_u", "_v"),
    prune.BasePruningMethod: ("_orig", "_mask"),
}
"""torch's hooks that set a weight before each call -> suffixes of the tensors from which they compute it."""


@dataclass(frozen=True)
class _ComputedTensor:
    """A tensor of a module that is computed at each call.

    Attributes:
        leaf: the tensor's name in the module.
        evaluate: function that computes it in eval mode, without changing the module.
        sources: names of the module's tensors that are only used to compute it.
        hook: the key of the forward pre-hook that sets it; None for a parametrization.
    """

    leaf: str
    evaluate: Callable[[], Tensor]
    sources: Collection[str] = ()
    hook: int | None = None


def read_module_tensor(module: nn.Module, leaf: str) -> object:
    """Return an attribute of a module; a computed tensor is evaluated in eval mode, outside traces."""
    found = {computed.leaf: computed for computed in _find_computed_tensors(module)}
    return found[leaf].evaluate() if leaf in found else getattr(module, leaf, None)


def get_tensor_identity(module: nn.Module, leaf: str) -> int:
    """Return a number that identifies a tensor of a module, even if it is computed at each call."""
    if parametrize.is_parametrized(module, leaf):
        return id(module.get_submodule(f"{_PARAMETRIZATIONS}.{leaf}"))
    return id(getattr(module, leaf))


def is_inside_parametrization(path: str, model: nn.Module) -> bool:
    """Return whether a path is inside a parametrization, whose modules are not layers of the model."""
    owner, found, _ = path.partition(f".{_PARAMETRIZATIONS}.")
    return bool(found) and parametrize.is_parametrized(model.get_submodule(owner))


def materialize_weights(model: nn.Module) -> nn.Module:
    """Return the model; if it computes weights at each call, a structural copy in which they are parameters.

    Each parameter has the present value in eval mode and requires no gradient.
    """
    if not any(True for module in model.modules() for _ in _find_computed_tensors(module)):
        return model
    copied = Host.of(model).copy(share_buffers=True).model
    for name, parameter in model.named_parameters():
        copied.get_parameter(name).requires_grad_(parameter.requires_grad)
    for module in list(copied.modules()):
        found = [(computed, computed.evaluate()) for computed in _find_computed_tensors(module)]
        if parametrize.is_parametrized(module):
            del module._modules[_PARAMETRIZATIONS]
            module.__class__ = type(module).__bases__[0]
        for computed, value in found:
            if computed.hook is not None:
                del module._forward_pre_hooks[computed.hook]
            for name in (*computed.sources, computed.leaf):
                module.__dict__.pop(name, None)
                module._parameters.pop(name, None)
                module._buffers.pop(name, None)
            module.register_parameter(computed.leaf, nn.Parameter(value, requires_grad=False))
    return copied


def _find_computed_tensors(module: nn.Module) -> Iterator[_ComputedTensor]:
    if parametrize.is_parametrized(module):
        for leaf, parametrization in module.get_submodule(_PARAMETRIZATIONS).named_children():
            # On a copy, since some parametrizations write into their buffers in training mode.
            evaluate = torch.no_grad()(lambda part=parametrization: copy_structure(part).eval()())
            yield _ComputedTensor(leaf, evaluate)
    for key, hook in module._forward_pre_hooks.items():
        kind = next((kind for kind in _HOOKS if isinstance(hook, kind)), None)
        if kind is not None:
            leaf = str(getattr(hook, "_tensor_name" if kind is prune.BasePruningMethod else "name"))
            sources = [f"{leaf}{suffix}" for suffix in _HOOKS[kind]]
            yield _ComputedTensor(leaf, functools.partial(_evaluate_hook, module, hook), sources, key)


@torch.no_grad()
def _evaluate_hook(module: nn.Module, hook: Any) -> Tensor:
    """Compute the value that a hook would set."""
    if isinstance(hook, prune.BasePruningMethod):
        value = hook.apply_mask(module)
    elif isinstance(hook, SpectralNorm):
        value = hook.compute_weight(module, do_power_iteration=False)
    else:
        value = hook.compute_weight(module)
    assert isinstance(value, Tensor)
    return value
