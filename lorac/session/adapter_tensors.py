"""An adapter's tensors as parameters and buffers of an nn.Module, and their keys in its state dict."""

import json
from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from lorac.errors import FormatError, Unavailable, warn
from lorac.formats.checkpoint import SEAL
from lorac.formats.native import describe_adapter
from lorac.storage.strict_json import dump_json, parse_object
from lorac.storage.tensor_hash import hash_contents
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant

_MARK = "~"
"""Marks lorac's own keys. In an escape a digit follows it; after a mark no digit does."""
_CONTAINER_ATTRIBUTES = frozenset(dir(nn.ModuleDict()))
"""Names that a container needs for its own attributes, such as ``items``."""


class AdapterTensors(nn.Module):
    """An adapter's tensors under names that are valid in a state dict, and the adapter's record.

    A state dict contains only tensors, so the record is stored as the bytes of a JSON text. It gives for each key the
    tensor's site and name, or, if the tensor has no site, the parameter that it replaces. A seal over the record and
    the tensors is verified when a file with them is read (``lorac.formats.checkpoint``).
    """

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter
        self._first_keys: dict[int, str] = {}
        self._places: dict[str, list[tuple[str | None, str]]] = {}
        self._warned: set[tuple[str, str]] = set()
        self._own: list[tuple[Mapping[str, torch.Tensor | None], str, torch.Tensor]] = []
        for path, tensors in adapter.tensors.items():
            for name, tensor in tensors.items():
                self._register(f"{_escape(path)}/{_escape(name)}", tensor, (path, name))
        for name, tensor in adapter.replaced.items():
            self._register(f"replaced{_MARK}/{_escape(name)}", tensor, (None, name))

    def _register(self, key: str, tensor: torch.Tensor, place: tuple[str | None, str]) -> None:
        self._places.setdefault(self._first_keys.setdefault(id(tensor), key), []).append(place)
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(key, tensor)
        else:
            self.register_buffer(key, tensor)
        self._own.append((self._parameters if isinstance(tensor, nn.Parameter) else self._buffers, key, tensor))

    def find_given(self) -> Adapter | None:
        """Return the adapter with the tensors that replace the module's, as in ``torch.func.functional_call``, or None.

        Raises:
            Unavailable: FSDP has replaced the tensors.
        """
        if all(held.get(key) is own for held, key, own in self._own):
            return None
        if "_is_fsdp_managed_module" in vars(self):
            raise Unavailable(
                f"FSDP trains copies of the tensors of adapter '{self.adapter.name}', not its own",
                next_step="compile the model again, and train it in a DistributedDataParallel",
            )
        given = Adapter(self.adapter.name, self.adapter.variant, provenance=self.adapter.provenance)
        for key, places in self._places.items():
            for path, name in places:
                at = given.replaced if path is None else given.tensors.setdefault(path, {})
                at[name] = getattr(self, key)
        return given

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "AdapterTensors":
        """Move buffers in place, as modules move parameters: the adapter and its training rules share the tensors."""
        own = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's, untyped
        for key, buffer in own.items():
            moved = self._buffers[key]
            if buffer is not None and moved is not None and moved is not buffer:
                buffer.data, self._buffers[key] = moved, buffer
        return self

    def repeated_keys(self) -> set[str]:
        """Return the keys of tensors that are registered under an earlier key already."""
        return {*self._parameters, *self._buffers} - {*self._places}

    def find_untrained(self, given: Collection[str]) -> list[tuple[str, str]]:
        """Return the tensors that learn only from a missing extra output, each with that output.

        Args:
            given: names of the extra outputs that the model gives.
        """
        methods = [(self.adapter.variant.method_at(path), own) for path, own in self.adapter.tensors.items()]
        found = {
            (name, output)
            for method, own in methods
            for name, output in (method.learns_from.items() if isinstance(method, BranchVariant) else ())
            if own[name].requires_grad and output not in given
        }
        return sorted(found)

    def warn_of_untrained(self, given: Collection[str]) -> None:
        """Warn of the tensors of ``find_untrained``, once of each."""
        wanted = self.find_untrained(given)
        for name, output in (one for one in wanted if one not in self._warned):
            warn(
                f"'{name}' of adapter '{self.adapter.name}' learns only from the output '{output}', and no loss of "
                "this model reads that",
                next_step=f'compile with aux=["{output}"], and add a loss of it, such as `sampled_selection_loss`',
            )
        self._warned.update(wanted)

    def get_extra_state(self) -> torch.Tensor:
        """Return the record, sealed together with the tensors' current values."""
        record = {"record": describe_adapter(self.adapter), "places": self._places}
        tensors = {key: getattr(self, key) for key in self._places}
        text = dump_json({**record, SEAL: hash_contents(dump_json(record), tensors)})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Warn if the loaded tensors are of another method or configuration. The loaded record is not kept."""
        what = "the record of an adapter in a state dict"
        text = bytes(state.tolist())
        loaded = parse_object(text, lambda why: FormatError(f"{what} {why}", code="corrupt_file")).get("record")
        own = json.loads(dump_json(describe_adapter(self.adapter)))
        differing = [f for f in ("variant", "config") if not isinstance(loaded, dict) or loaded.get(f) != own[f]]
        if differing:
            warn(
                f"the state for adapter '{self.adapter.name}' was saved from an adapter with another {differing[0]}",
                next_step="compile with the method and the hyper-parameters of the training",
            )


def _excluded_keys(module: nn.Module) -> set[str]:
    """Return the keys that a state dict leaves out: the model's parameters, which never change, and repeated keys."""
    host, adapters = module.get_submodule("host"), module.get_submodule("adapter_tensors")
    keys = {f"host.{name}" for name, _ in host.named_parameters(remove_duplicate=False)}
    for key, tensors in adapters.named_children():
        assert isinstance(tensors, AdapterTensors)
        keys |= {f"adapter_tensors.{key}.{name}" for name in tensors.repeated_keys()}
    return keys


def drop_excluded_keys(module: nn.Module, state: dict[str, object], prefix: str, _: object) -> None:
    """Remove the excluded keys from a state dict. A hook for ``register_state_dict_post_hook``."""
    for key in _excluded_keys(module):
        state.pop(f"{prefix}{key}", None)


def ignore_excluded_keys(module: nn.Module, keys: torch.nn.modules.module._IncompatibleKeys) -> None:
    """Remove the excluded keys from the missing ones. A hook for ``register_load_state_dict_post_hook``."""
    excluded = _excluded_keys(module)
    missing = []
    for key in keys.missing_keys:
        own = key
        while own and own not in excluded:  # a wrapper around the module puts its name before the key
            own = own.partition(".")[2]
        if not own:
            missing.append(key)
    keys.missing_keys[:] = missing


def state_dict_key(name: str) -> str:
    """Return a name as a part of a state dict's key; different names have different keys.

    ``.`` becomes ``/``, ``/`` becomes ``~1`` and ``~`` becomes ``~0``. A name that is an attribute of torch's
    containers gets a ``~`` at its end.
    """
    key = _escape(name)
    return f"{key}{_MARK}" if key in _CONTAINER_ATTRIBUTES else key


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1").replace(".", "/")
