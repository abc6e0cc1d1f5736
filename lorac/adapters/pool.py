"""The adapters of a compiled model, each with its prepared form."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.adapters.preparation import Preparer
from lorac.errors import AdapterError
from lorac.ir.slots.choice import require_adapter
from lorac.ir.slots.plans import PreparedAdapter
from lorac.variants.adapter import Adapter


@dataclass(frozen=True)
class TensorVersions:
    """The tensors of some adapters and how often each was written.

    Attributes:
        versions: each tensor's identity and write count; equal if no tensor was written or exchanged in between.
        tensors: the tensors, kept alive so that no new tensor can get the identity of one of them.
        sums: addresses of the tensors and sums of their bits, which show writes that torch does not count; empty where
            none are expected.
        bits: the tensors as integers.
    """

    versions: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    sums: tuple[int, ...] = ()
    bits: tuple[Tensor, ...] = ()

    def agrees(self, now: TensorVersions) -> bool:
        """Return whether nothing was written between these versions and later ones."""
        return self.versions == now.versions and self.sums == now.sums


_OUTDATED = TensorVersions((), ())
"""Equals the versions of no adapter, so that the adapter is prepared at its next use."""


@dataclass(frozen=True)
class PoolEntry:
    """An adapter in a pool.

    Attributes:
        prepared: its normal forms.
        versions: the versions of its tensors from which the normal forms were made.
    """

    adapter: Adapter
    prepared: PreparedAdapter
    versions: TensorVersions


class AdapterPool(Mapping[str, PreparedAdapter]):
    """Name -> prepared adapter. An adapter is prepared again only after its tensors were written.

    Args:
        preparer: computes the normal forms.
        trains: whether the adapters train here, so that writes are expected that torch does not count.

    Attributes:
        entries: name -> entry; adding and removing replace the mapping, so that a reference to it is a copy.
        given: name -> returns the adapter over other tensors, if its module was given such.
    """

    def __init__(self, preparer: Preparer, *, trains: bool = False) -> None:
        self._preparer, self._trains = preparer, trains
        self._lock = threading.RLock()
        self.entries: dict[str, PoolEntry] = {}
        self.given: Mapping[str, Callable[[], Adapter | None]] = {}

    def __getitem__(self, name: str) -> PreparedAdapter:
        with self._lock:
            require_adapter(name, self.entries)
            entry = self.entries[name]
            now = self.read_versions((entry.adapter,), entry.versions)
            if not entry.versions.agrees(now):
                self._preparer.forget_shared(now.tensors if now.versions == entry.versions.versions else ())
                entry = self.entries[name] = PoolEntry(entry.adapter, self._preparer.prepare(entry.adapter), now)
            return entry.prepared

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Name -> adapter."""
        with self._lock:
            return {name: entry.adapter for name, entry in self.entries.items()}

    def find_given(self, names: Iterable[str]) -> dict[str, Adapter]:
        """Return those of some adapters whose modules were given other tensors, with these."""
        found = ((name, self.given[name]()) for name in names if name in self.given)
        return {name: adapter for name, adapter in found if adapter is not None}

    def prepare(self, adapter: Adapter) -> PreparedAdapter:
        """Return an adapter's normal forms without adding it.

        Raises:
            AdapterError: the name is taken.
        """
        self.check_name_free(adapter.name)
        return self._preparer.prepare(adapter)

    def add(self, adapter: Adapter, prepared: PreparedAdapter | None = None) -> None:
        """Add an adapter.

        Args:
            prepared: its normal forms; None: they are computed at its first use.

        Raises:
            AdapterError: the name is taken.
        """
        if prepared is None:
            entry = PoolEntry(adapter, PreparedAdapter({}, {}), _OUTDATED)
        else:
            entry = PoolEntry(adapter, prepared, self.read_versions((adapter,)))
        with self._lock:
            self.check_name_free(adapter.name)
            self.entries = {**self.entries, adapter.name: entry}

    def remove(self, name: str) -> None:
        """Remove an adapter."""
        with self._lock:
            require_adapter(name, self.entries)
            self.entries = {key: entry for key, entry in self.entries.items() if key != name}

    def invalidate(self) -> None:
        """Prepare every adapter again at its next use, because the model's own tensors were exchanged."""
        with self._lock:
            self.entries = {
                name: PoolEntry(entry.adapter, entry.prepared, _OUTDATED) for name, entry in self.entries.items()
            }

    def check_name_free(self, name: str) -> None:
        """Raise ``AdapterError`` if the name is taken."""
        if name in self.entries:
            raise AdapterError(
                f"an adapter called '{name}' is already there",
                next_step="name it otherwise, compile by adapters={name: ...} and add_adapter by name=, "
                "or remove_adapter the other first",
                code="adapter_exists",
            )

    def select(self, names: Sequence[str]) -> tuple[Adapter, ...]:
        """Return the adapters of the given names.

        Raises:
            AdapterNotFound: an adapter was removed or never added.
        """
        with self._lock:
            for name in names:
                require_adapter(name, self.entries)
            return tuple(self.entries[name].adapter for name in names)

    def read_versions(self, adapters: Sequence[Adapter], before: TensorVersions = _OUTDATED) -> TensorVersions:
        """Return the present versions of the tensors of some adapters, faster where earlier ones are given.

        Torch counts writes by operations in place, with gradients or without. It counts no write through
        ``tensor.data``, as research optimizers and moving averages make them, nor one to a tensor made in inference
        mode. Those show in the sums.
        """
        tensors = tuple(itertools.chain.from_iterable(adapter.parameters() for adapter in adapters))
        try:
            counts = [tensor._version for tensor in tensors]
        except RuntimeError:  # a tensor made in inference mode has no count; asking each tensor first would slow calls
            counts = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        versions = (*map(id, tensors), *counts)
        if not self._trains or not tensors:
            return TensorVersions(versions, tensors)
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        same = before.sums[: len(tensors)] == addresses and all(map(operator.is_, before.tensors, tensors))
        bits = before.bits if same else tuple(t.detach().view(_INTEGERS[t.element_size()]) for t in tensors)
        # One transfer brings the sums from a device.
        sums = torch.stack([each.sum().to(bits[0].device) for each in bits]).tolist()
        return TensorVersions(versions, tensors, (*addresses, *sums), bits)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size of a number in bytes -> the integers of that size."""
