"""The eager ``Compiled``: an nn.Module, so that whatever trains a module trains it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorac.errors import FormatError, Unavailable, warn
from lorac.ir.slots.choice import UNSET
from lorac.session.compiled import Compiled
from lorac.session.presentation import INTERFACE, describe_compiled, unknown_attribute
from lorac.storage.strict_json import dump_json, parse_object


class CompiledModule(nn.Module, Compiled):
    """A compiled model that is an nn.Module: ``train``, ``parameters``, ``to``, hooks and ``Trainer`` work on it.

    Of its parameters only adapter tensors need gradients. Attributes it lacks are looked up on the host copy.

    Its state dict has what a training may change, each tensor once: the adapters' tensors under
    ``adapter_tensors.<name>.``, where a ``/`` stands for a dot within a name (``key_of``), with each adapter's record;
    and the host's buffers under ``host.``, but not its parameters. A model with the same adapters takes it by
    ``load_state_dict``, and ``lorac.load_adapter`` reads a file of it, as transformers' ``Trainer`` writes them.
    """

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.host = module
        self.adapter_tensors = nn.ModuleDict()
        self.training = module.training
        nn.Module.register_state_dict_post_hook(self, _drop_excluded_keys)
        nn.Module.register_load_state_dict_post_hook(self, _ignore_excluded_keys)

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
        record = self.services.record
        made = {
            state_dict_key(n): kept.get(adapter) or _AdapterTensors(adapter, record) for n, adapter in there.items()
        }
        self.adapter_tensors = nn.ModuleDict(made).train(self.training)

    def save_pretrained(self, folder: Any) -> None:
        """Write the adapters as PEFT does: the only one into the folder, several each into one of its name in it.

        Args:
            folder: where; what else is in it stays.

        Raises:
            FormatError: PEFT has no such method; ``lorac.save_adapter`` writes any in lorac's own format.
        """
        adapters = self.pool.adapters
        for name, adapter in adapters.items():
            self.services.save_adapter(adapter, Path(folder) if len(adapters) == 1 else Path(folder) / name)

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
        return describe_compiled(self)

    def __dir__(self) -> list[str]:
        inherited = (n for n, own in vars(nn.Module).items() if n[0] != "_" and callable(own))
        return sorted({*INTERFACE, "save_pretrained", *inherited})

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
            raise unknown_attribute(self, name) from error


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


class _AdapterTensors(nn.Module):
    """An adapter's tensors as parameters and buffers, under names a state dict can hold, and its record.

    Args:
        adapter: the adapter.
        record: adapter -> all that a file says of it beside its tensors, as JSON.

    A state dict holds the record as the bytes of a text, since tensors are all that its files can hold. It says by
    key what the tensor is: its site and name, or where there is no site the parameter that it replaces.
    """

    def __init__(self, adapter: Any, record: Callable[[Any], Mapping[str, Any]]) -> None:
        super().__init__()
        self.adapter, self._record = adapter, record
        self._first: dict[int, str] = {}
        self._places: dict[str, list[tuple[str | None, str]]] = {}
        for path, tensors in adapter.tensors.items():
            for name, tensor in tensors.items():
                self._keep(f"{_escape(path)}/{_escape(name)}", tensor, (path, name))
        for name, tensor in adapter.replaced.items():
            self._keep(f"replaced{_RESERVED_MARK}/{_escape(name)}", tensor, (None, name))

    def _keep(self, key: str, tensor: torch.Tensor, place: tuple[str | None, str]) -> None:
        self._places.setdefault(self._first.setdefault(id(tensor), key), []).append(place)
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(key, tensor)
        else:
            self.register_buffer(key, tensor)

    def second_names(self) -> set[str]:
        """The keys of tensors that an earlier key has."""
        return {*self._parameters, *self._buffers} - {*self._places}

    def get_extra_state(self) -> torch.Tensor:
        """The record."""
        text = dump_json({"record": self._record(self.adapter), "places": self._places})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Say where what is loaded was saved of another method, or with other settings: only tensors are taken."""
        said = parse_object(bytes(state.tolist()), _corrupt_record).get("record")
        own = json.loads(dump_json(self._record(self.adapter)))
        differ = [what for what in ("variant", "config") if not isinstance(said, dict) or said.get(what) != own[what]]
        if differ:
            warn(
                f"what is loaded into adapter '{self.adapter.name}' was saved of one with another {differ[0]}",
                next_step="compile with the method and the hyper-parameters of the training",
            )


def _excluded_keys(module: CompiledModule) -> set[str]:
    """The keys that no state dict needs: the host's parameters, which are never written, and second names."""
    names = {f"host.{name}" for name, _ in module.host.named_parameters(remove_duplicate=False)}
    for key, tensors in module.adapter_tensors.items():
        assert isinstance(tensors, _AdapterTensors)
        names |= {f"adapter_tensors.{key}.{name}" for name in tensors.second_names()}
    return names


def _drop_excluded_keys(module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in _excluded_keys(module):
        state.pop(f"{prefix}{key}", None)


def _ignore_excluded_keys(module: Any, keys: Any) -> None:
    """What a state dict does not have because of ``_elsewhere`` is not missing from it."""
    left = _excluded_keys(module)
    keys.missing_keys[:] = [key for key in keys.missing_keys if not left & set(_key_suffixes(key))]


def _key_suffixes(key: str) -> Iterator[str]:
    """A key, and what is left of it without the names of one module around it after another."""
    while key:
        yield key
        key = key.partition(".")[2]


def _corrupt_record(reason: str) -> FormatError:
    return FormatError(f"the record of an adapter in a state dict {reason}", code="corrupt_file")


_RESERVED_MARK = "~"
"""Marks what is lorac's own in a key: behind it stands no digit, as it does in an escape."""
_CONTAINER_ATTRIBUTES = frozenset(dir(nn.ModuleDict()))
"""Names that a container keeps for its own attributes, such as ``items``."""


def state_dict_key(name: str) -> str:
    """A name as a part of a state dict's key: no two names have one key.

    ``.`` becomes ``/``, ``/`` becomes ``~1`` and ``~`` becomes ``~0``; a name that torch's containers keep for
    themselves gets a ``~`` at its end.
    """
    key = _escape(name)
    return f"{key}{_RESERVED_MARK}" if key in _CONTAINER_ATTRIBUTES else key


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1").replace(".", "/")
