"""The adapters of a compiled model, each with its prepared form."""

import collections
import functools
import itertools
import operator
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.adapters.fit import check_values
from lorac.adapters.packing import pack_adapter
from lorac.adapters.preparation import Preparer
from lorac.adapters.stored import StoredAdapter
from lorac.errors import AdapterError
from lorac.ir.slots.choice import require_adapter
from lorac.ir.slots.plans import PreparedAdapter
from lorac.target.memory_budget import Charge, MemoryBudget
from lorac.variants._missing_method import class_modules
from lorac.variants.adapter import Adapter


@dataclass(frozen=True)
class TensorVersions:
    """The tensors of some adapters and how often each was written.

    Attributes:
        versions: each entry's serial, and each tensor's identity and write count; equal if no adapter was exchanged and
            no tensor written or exchanged in between.
        tensors: the tensors, kept alive so that no new tensor can get the identity of one of them.
        sums: addresses of the tensors and sums of their bits, which show writes that torch does not count; empty where
            none are expected.
        bits: the tensors as integers.
    """

    versions: tuple[int, ...]
    tensors: tuple[Tensor, ...] = ()
    sums: tuple[int, ...] = ()
    bits: tuple[Tensor, ...] = ()

    def agrees(self, now: "TensorVersions") -> bool:
        """Return whether nothing was written between these versions and later ones."""
        return self.versions == now.versions and self.sums == now.sums


_KEPT_TIMES = 10_000
"""How many times of reads are kept."""
_NEVER = TensorVersions(())
"""Equals the versions of no adapter."""


@dataclass(frozen=True, eq=False, slots=True)
class PoolEntry:
    """An adapter in a pool, in memory or on disk.

    Attributes:
        source: the adapter itself, or how to read it.
        serial: a number that no other entry of this process has.
        charge: the memory of its tensors; None on disk.
    """

    source: Adapter | StoredAdapter
    serial: int
    charge: Charge | None

    @property
    def adapter(self) -> Adapter | None:
        """The adapter, if it is in memory."""
        return self.source if isinstance(self.source, Adapter) else None


@dataclass(frozen=True, eq=False)
class _PreparedEntry:
    """The normal forms of an entry.

    Attributes:
        entry: the entry that they were made of.
        prepared: the normal forms.
        versions: the versions of its tensors then.
        charge: their memory.
    """

    entry: PoolEntry
    prepared: PreparedAdapter
    versions: TensorVersions
    charge: Charge


class AdapterPool(Mapping[str, PreparedAdapter]):
    """Name -> prepared adapter. It is prepared when it is used, and again after its tensors were written.

    Prepared adapters are kept while the budget has room for them.

    Args:
        preparer: computes the normal forms.
        trains: whether the adapters train here, so that writes are expected that torch does not count.

    Attributes:
        budget: counts the memory of adapters, in whatever form.
        entries: name -> entry.
        given: name -> returns the adapter over other tensors, if its module was given such.
        read_seconds: times of the last reads of adapters from disk; who reports them takes them out.
    """

    def __init__(self, preparer: Preparer, *, trains: bool = False) -> None:
        self._preparer, self._trains = preparer, trains
        self._lock = threading.RLock()
        self.budget = MemoryBudget()
        self.entries: dict[str, PoolEntry] = {}
        self._prepared: dict[str, _PreparedEntry] = {}
        self.read_seconds = collections.deque[float](maxlen=_KEPT_TIMES)
        self.given: Mapping[str, Callable[[], Adapter | None]] = {}

    def __getitem__(self, name: str) -> PreparedAdapter:
        found = self._find_prepared(self.find(name), name)
        if found is not None:
            return found
        with self._lock:
            entry = self.find(name)
            return self._find_prepared(entry, name) or self._prepare(name, entry)

    def _find_prepared(self, entry: PoolEntry, name: str) -> PreparedAdapter | None:
        """Return the normal forms of an entry if they are kept, and made of its tensors as they are."""
        known = self._prepared.get(name)
        if known is None or known.entry is not entry:
            return None
        if not known.versions.agrees(self.read_versions((entry,), known.versions)):
            return None
        self.budget.touch((id(self), name))
        return known.prepared

    def _prepare(self, name: str, entry: PoolEntry) -> PreparedAdapter:
        """Make the normal forms of an entry, and keep them."""
        known, adapter = self._prepared.get(name), entry.adapter
        if adapter is None:
            assert isinstance(entry.source, StoredAdapter)
            begun, room = time.monotonic(), self.budget.claim(entry.source.nbytes)
            try:
                prepared = self._prepare_packed(entry.source.read(name))
            finally:
                room.resize(0)  # an error's traceback would hold it
            self.read_seconds.append(time.monotonic() - begun)
            return self._keep(name, entry, prepared, self.read_versions((entry,)))
        before = _NEVER if known is None else known.versions
        now = self.read_versions((entry,), before)
        check_values(adapter)
        self._preparer.forget_shared(now.tensors if now.versions == before.versions else ())
        return self._keep(name, entry, self._prepare_packed(adapter), now)

    def _keep(
        self, name: str, entry: PoolEntry, prepared: PreparedAdapter, versions: TensorVersions, *, always: bool = False
    ) -> PreparedAdapter:
        """Keep normal forms.

        Args:
            always: whatever the room: they cannot be made again.
        """
        charge = self.budget.charge(prepared.tensors())
        kept = _PreparedEntry(entry, prepared, versions, charge)
        take = functools.partial(operator.setitem, self._prepared, name, kept)
        if always:
            take()
        else:
            self.budget.keep((id(self), name), charge, take, functools.partial(self._prepared.pop, name, None))
        return prepared

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Name -> adapter, of those in memory."""
        with self._lock:
            return {name: entry.source for name, entry in self.entries.items() if isinstance(entry.source, Adapter)}

    @property
    def registered(self) -> list[str]:
        """Names of the adapters on disk."""
        return [name for name, entry in self.entries.items() if entry.adapter is None]

    @property
    def resident(self) -> list[str]:
        """Names of the adapters whose prepared form is in memory."""
        return [*self._prepared]

    def find(self, name: str) -> PoolEntry:
        """Return the entry of a name.

        Raises:
            AdapterNotFound: the adapter was removed or never added.
        """
        entry = self.entries.get(name)
        if entry is None:
            require_adapter(name, self.entries)
            raise KeyError(name)
        return entry

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
        return self._prepare_packed(adapter)

    def _prepare_packed(self, adapter: Adapter) -> PreparedAdapter:
        """Return an adapter's normal forms in few blocks of memory, unless it trains and is prepared at every step."""
        if self._trains:
            return self._preparer.prepare(adapter)
        return pack_adapter(self._preparer.prepare(adapter, contiguous=False), adapter)

    def add(self, adapter: Adapter, prepared: PreparedAdapter | None = None) -> None:
        """Add an adapter in memory.

        Args:
            prepared: its normal forms; None: they are computed at its first use.

        Raises:
            AdapterError: the name is taken.
            OverBudget: there is no room for its tensors.
        """
        entry = PoolEntry(adapter, next(_SERIALS), self.budget.charge(adapter.parameters()))
        with self._lock:
            self.check_name_free(adapter.name)
            if prepared is not None:
                always = bool(class_modules(adapter.variant))
                self._keep(adapter.name, entry, prepared, self.read_versions((entry,)), always=always)
            self.entries[adapter.name] = entry

    def register(self, adapters: Mapping[str, StoredAdapter]) -> None:
        """Add adapters on disk, all or none.

        Raises:
            AdapterError: a name is taken.
        """
        with self._lock:
            for name in adapters:
                self.check_name_free(name)
            self.entries |= {name: PoolEntry(stored, next(_SERIALS), None) for name, stored in adapters.items()}

    def remove(self, name: str) -> None:
        """Remove an adapter."""
        with self._lock:
            self.find(name)
            # A new mapping, so that whoever holds the old one can bring it back.
            self.entries = {key: entry for key, entry in self.entries.items() if key != name}
            self._prepared.pop(name, None)
            self.budget.forget((id(self), name))

    def invalidate(self) -> None:
        """Prepare every adapter again at its next use, because the model's own tensors were exchanged."""
        with self._lock:
            self._prepared.clear()

    def check_name_free(self, name: str) -> None:
        """Raise ``AdapterError`` if the name is taken."""
        if name in self.entries:
            raise AdapterError(
                f"an adapter called '{name}' is already there",
                next_step="name it otherwise, compile by adapters={name: ...} and add_adapter by name=, "
                "or remove_adapter the other first",
                code="adapter_exists",
            )

    def select(self, names: Sequence[str]) -> tuple[PoolEntry, ...]:
        """Return the entries of the given names.

        Raises:
            AdapterNotFound: an adapter was removed or never added.
        """
        return tuple(self.find(name) for name in names)

    def read_versions(self, entries: Sequence[PoolEntry], before: TensorVersions = _NEVER) -> TensorVersions:
        """Return the present versions of the tensors of some adapters, faster where earlier ones are given.

        Torch counts writes by operations in place, with gradients or without. It counts no write through
        ``tensor.data``, as research optimizers and moving averages make them, nor one to a tensor made in inference
        mode. Those show in the sums.
        """
        adapters = [entry.adapter for entry in entries if entry.adapter is not None]
        tensors = tuple(itertools.chain.from_iterable(adapter.parameters() for adapter in adapters))
        try:
            counts = [tensor._version for tensor in tensors]
        except RuntimeError:  # a tensor made in inference mode has no count; asking each tensor first would slow calls
            counts = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        versions = (*(entry.serial for entry in entries), *map(id, tensors), *counts)
        if not self._trains or not tensors:
            return TensorVersions(versions, tensors)
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        same = before.sums[: len(tensors)] == addresses and all(map(operator.is_, before.tensors, tensors))
        bits = before.bits if same else tuple(t.detach().view(_INTEGERS[t.element_size()]) for t in tensors)
        # One transfer brings the sums from a device.
        sums = torch.stack([each.sum().to(bits[0].device) for each in bits]).tolist()
        return TensorVersions(versions, tensors, (*addresses, *sums), bits)


_SERIALS = itertools.count(1)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Size of a number in bytes -> the integers of that size."""
