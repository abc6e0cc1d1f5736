"""The eager ``Compiled``: an nn.Module, so that whatever trains a module trains it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from lorac.errors import Unavailable
from lorac.ir.slots.choice import UNSET
from lorac.runtime.compiled import Compiled
from lorac.runtime.report import INTERFACE, no_attribute, summary


class CompiledModule(nn.Module, Compiled):
    """A compiled model that is an nn.Module: ``train``, ``parameters``, ``to``, hooks and ``Trainer`` work on it.

    Of its parameters only adapter tensors need gradients. Attributes it lacks are looked up on the host copy.

    Its state dict has the host's under ``host.`` and each adapter's under ``adapter_tensors.<name>.``, where a ``/``
    stands for a dot within a name (``key_of``); a model with the same adapters takes it by ``load_state_dict``.
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

    def registered(self) -> None:
        """Have the tensors of the pool's adapters as parameters and buffers, and no others."""
        kept = {module.adapter: module for module in self.adapter_tensors.values()}
        there = self.pool.adapters
        made = nn.ModuleDict({key_of(n): kept.get(adapter) or _Tensors(adapter) for n, adapter in there.items()})
        self.adapter_tensors = made.train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledModule:
        """As nn.Module's, behind ``to``, ``half`` and ``cuda``: parameters become other ones, which nothing counts.

        Raises:
            Unavailable: of another dtype, or elsewhere in fused mode, whose weights a swap writes where they lie.
        """
        for tensor in self.parameters() if self.mode != "baked" else ():
            moved = fn(tensor.detach()[:0] if tensor.dim() else tensor.detach().clone())
            if moved.dtype != tensor.dtype or (self.mode == "fused" and moved.device != tensor.device):
                raise Unavailable(
                    "what was compiled stays in its dtype, and in fused mode where it is",
                    next_step="compile the model again with dtype= or device=",
                )
        nn.Module._apply(self, fn, recurse)
        self.renew()
        return self

    def __repr__(self) -> str:
        return summary(self)

    def __dir__(self) -> list[str]:
        return sorted({*INTERFACE, *(n for n, own in vars(nn.Module).items() if n[0] != "_" and callable(own))})

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "host" or "_modules" not in self.__dict__ or "host" not in self._modules:
                raise
            return self._of_host(name)

    def _of_host(self, name: str) -> Any:
        try:
            return getattr(self._modules["host"], name)
        except AttributeError as error:
            raise no_attribute(self, name) from error


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
        self.adapter = adapter
        for path, tensors in adapter.tensors.items():
            for name, tensor in tensors.items():
                self._keep(f"{_escaped(path)}/{_escaped(name)}", tensor)
        for name, tensor in adapter.replaced.items():
            self._keep(f"replaced{_OWN}/{_escaped(name)}", tensor)

    def _keep(self, key: str, tensor: torch.Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(key, tensor)
        else:
            self.register_buffer(key, tensor)


_OWN = "~"
"""Marks what is lorac's own in a key: behind it stands no digit, as it does in an escape."""
_TAKEN = frozenset(dir(nn.ModuleDict()))
"""Names that a container keeps for its own attributes, such as ``items``."""


def key_of(name: str) -> str:
    """A name as a part of a state dict's key: no two names have one key.

    ``.`` becomes ``/``, ``/`` becomes ``~1`` and ``~`` becomes ``~0``; a name that torch's containers keep for
    themselves gets a ``~`` at its end.
    """
    key = _escaped(name)
    return f"{key}{_OWN}" if key in _TAKEN else key


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1").replace(".", "/")
