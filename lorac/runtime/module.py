"""The eager ``Compiled``: an nn.Module, so that whatever trains a module trains it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from lorac.ir.slots.choice import UNSET
from lorac.runtime.compiled import Compiled


class CompiledModule(nn.Module, Compiled):
    """A compiled model that is an nn.Module: ``train``, ``parameters``, ``to``, hooks and ``Trainer`` work on it.

    Of its parameters only adapter tensors need gradients. Attributes it lacks are looked up on the host copy.
    """

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.host = module
        self.adapter_tensors = nn.ModuleDict()
        self.training = module.training

    def forward(self, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        """The host's forward, with the active adapters or those chosen for this call."""
        return self.call(args, kwargs, adapters)

    def train(self, mode: bool = True) -> CompiledModule:
        """As nn.Module's; in eval mode the slots hold the tensors as they were trained."""
        nn.Module.train(self, mode)
        if not mode and self.mode == "live":
            self._fresh(self._state)
        return self

    def computes_terms(self) -> bool:
        """Whether a call made now reads the adapters' own tensors: in training."""
        return self.engine.computes_terms

    def registered(self, adapter: Any) -> None:
        """Make an adapter's tensors parameters of this module."""
        self.adapter_tensors[_key(adapter.name)] = _Tensors(adapter)

    def unregistered(self, name: str) -> None:
        """Take an adapter's tensors out again."""
        del self.adapter_tensors[_key(name)]

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "host" or "_modules" not in self.__dict__ or "host" not in self._modules:
                raise
            return getattr(self._modules["host"], name)


def compiled_module(module: nn.Module) -> CompiledModule:
    """A compiled model over a host copy, of a class whose ``forward`` shows the host's signature.

    Trainers choose a dataset's columns, find the labels and decide who averages the loss from the signature of the
    class's ``forward``, and some of it from the class's name.
    """
    host = type(module)

    def forward(self: CompiledModule, *args: Any, adapters: Any = UNSET, **kwargs: Any) -> Any:
        return self.call(args, kwargs, adapters)

    forward.__doc__ = CompiledModule.forward.__doc__
    forward.__signature__ = inspect.signature(host.forward)  # type: ignore[attr-defined]  # functions take attributes
    members: dict[str, Any] = {"forward": forward, "__module__": __name__, "__doc__": CompiledModule.__doc__}
    made: type[CompiledModule] = type(f"Compiled{host.__name__}", (CompiledModule,), members)
    return made(module)


class _Tensors(nn.Module):
    """An adapter's tensors as parameters and buffers, under names a state dict can hold."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        for path, tensors in adapter.tensors.items():
            for name, tensor in tensors.items():
                self._keep(f"{path}.{name}", tensor)
        for name, tensor in adapter.replaced.items():
            self._keep(f"replaced.{name}", tensor)

    def _keep(self, name: str, tensor: torch.Tensor) -> None:
        key = _key(name)
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(key, tensor)
        else:
            self.register_buffer(key, tensor)


def _key(name: str) -> str:
    return name.replace(".", "/")
