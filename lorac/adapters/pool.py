"""The adapters of a compiled model, each with its prepared form."""

import collections
import functools
import itertools
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.adapters.fit import check_values
from lorac.adapters.preparation import Preparer
from lorac.adapters.stored import StoredAdapter
from lorac.errors import AdapterError
from lorac.ir.slots.choice import require_adapter
from lorac.ir.slots.plans import PreparedAdapter
from lorac.ir.traces.gate import outside_traces
from lorac.target.memory_budget import Charge, MemoryBudget
from lorac.variants._missing_method import class_modules
from lorac.variants.adapter import Adapter
from lorac.variants.base import invocation_of


@dataclass(frozen=True)
class TensorVersions:
    """The tensors of some adapters, and the number of writes to each.

    Attributes:
        versions: each entry's serial, and each tensor's identity and write count; equal if no adapter was replaced and
            no tensor written or replaced in between.
        tensors: the tensors, kept alive so that no new tensor can have the same identity.
        sums: addresses of the tensors and sums of their bits, which reveal writes that torch does not count; empty
            where no such writes are expected.
        bits: the tensors as integers.
    """

    versions: tuple[int, ...]
    tensors: tuple[Tensor, ...] = ()
    sums: tuple[int, ...] = ()
    bits: tuple[Tensor, ...] = ()


_KEPT_TIMES = 10_000
"""Most read times that are kept."""
_NEVER = TensorVersions(())
"""Versions that differ from those of any adapter."""


@dataclass(eq=False, slots=True)
class PoolEntry:
    """An adapter in a pool, in memory or on disk.

    Attributes:
        source: the adapter, or the stored adapter to read.
        serial: a number that is unique in this process.
        charge: the memory charge of its tensors; None on disk.
        forms: cached normal forms, the versions of the tensors from which they were made, and their memory charge.
        slots: the memory charge of the slots that hold it alone, until they are gone.
    """

    source: Adapter | StoredAdapter
    serial: int
    charge: Charge | None
    forms: tuple[PreparedAdapter, TensorVersions, Charge] | None = None
    slots: weakref.ref[Charge] | None = None

    @property
    def adapter(self) -> Adapter | None:
        """The adapter, if it is in memory."""
        return self.source if isinstance(self.source, Adapter) else None

    @property
    def is_ready(self) -> bool:
        """Whether calls can use it without a read."""
        return self.forms is not None or (self.slots is not None and self.slots() is not None)


class AdapterPool(Mapping[str, PreparedAdapter]):
    """Name -> prepared adapter. An adapter is prepared at its first use, and again after its tensors were written.

    Prepared adapters are cached while the budget has room for them.

    Args:
        preparer: computes the normal forms.
        trains: whether the adapters train here, so that writes that torch does not count are expected.

    Attributes:
        preparer: computes the normal forms.
        budget: the budget for the memory of adapters in all forms.
        entries: name -> entry.
        given: name -> function that returns the adapter with the substituted tensors of its module, or None if there
            are none.
        read_seconds: times of the last reads of adapters from disk; a reader of the times removes them.
    """

    def __init__(self, preparer: Preparer, *, trains: bool = False) -> None:
        self.preparer, self._trains = preparer, trains
        self._lock = threading.RLock()
        self.budget = MemoryBudget()
        self.entries: dict[str, PoolEntry] = {}
        self.read_seconds = collections.deque[float](maxlen=_KEPT_TIMES)
        self.given: Mapping[str, Callable[[], Adapter | None]] = {}

    def __getitem__(self, name: str) -> PreparedAdapter:
        found = self._find_prepared(self.find(name))
        if found is not None:
            return found
        with self._lock:
            entry = self.find(name)
            return self._find_prepared(entry) or self._prepare(name, entry)

    def _find_prepared(self, entry: PoolEntry) -> PreparedAdapter | None:
        """Return the cached normal forms of an entry if they were made from its present tensors; else None."""
        forms = entry.forms  # another thread may evict them
        if forms is None:
            return None
        prepared, versions, _ = forms
        if not self.has_versions((entry,), versions):
            return None
        self.budget.touch((id(self), entry.serial))
        return prepared

    def _prepare(self, name: str, entry: PoolEntry) -> PreparedAdapter:
        """Compute the normal forms of an entry, and cache them."""
        adapter = entry.adapter
        if adapter is None:
            assert isinstance(entry.source, StoredAdapter)
            begun, room = time.monotonic(), self.budget.claim(entry.source.nbytes)
            try:
                prepared = self._prepare_packed(entry.source.read(name))
            finally:
                room.resize(0)  # an error's traceback would keep the memory alive
            self.read_seconds.append(time.monotonic() - begun)
            return self._keep(entry, prepared, self.read_versions((entry,)))
        forms = entry.forms  # another thread may evict them
        before = _NEVER if forms is None else forms[1]
        now = self.read_versions((entry,), before)
        check_values(adapter)
        self.preparer.forget_shared(now.tensors if now.versions == before.versions else ())
        return self._keep(entry, self._prepare_packed(adapter), now)

    def _keep(
        self, entry: PoolEntry, prepared: PreparedAdapter, versions: TensorVersions, *, always: bool = False
    ) -> PreparedAdapter:
        """Cache normal forms.

        Args:
            always: cache them even without room in the budget, since they cannot be made again.
        """
        charge = self.budget.charge(prepared.tensors())
        forms = prepared, versions, charge
        if always:
            entry.forms = forms
        else:
            take, drop = (functools.partial(setattr, entry, "forms", value) for value in (forms, None))
            self.budget.keep((id(self), entry.serial), charge, take, drop)
        return prepared

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Name -> adapter, for adapters in memory."""
        with self._lock:
            return {name: entry.source for name, entry in self.entries.items() if isinstance(entry.source, Adapter)}

    @property
    def registered(self) -> list[str]:
        """Names of the adapters on disk."""
        return [name for name, entry in self.entries.items() if entry.adapter is None]

    @property
    def resident(self) -> list[str]:
        """Names of the adapters that are ready in memory."""
        return [name for name, entry in tuple(self.entries.items()) if entry.is_ready]

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

    def invocation(self, name: str) -> tuple[int, ...]:
        """Return the token ids from which on an adapter acts; empty for an adapter that acts on every token."""
        source = self.find(name).source
        return source.invocation if isinstance(source, StoredAdapter) else invocation_of(source.variant)

    def find_given(self, names: Iterable[str]) -> dict[str, Adapter]:
        """Return, among these adapters, those whose modules have substituted tensors, with these tensors."""
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
        """Return an adapter's normal forms, packed into few blocks of memory unless the pool trains."""
        return self.preparer.prepare(adapter, packed=not self._trains)

    def add(self, adapter: Adapter, prepared: PreparedAdapter | None = None) -> None:
        """Add an adapter in memory.

        Args:
            prepared: the adapter's normal forms; None: they are computed at its first use.

        Raises:
            AdapterError: the name is taken.
            OverBudget: the budget has no room for the adapter's tensors.
        """
        entry = PoolEntry(adapter, next(_SERIALS), self.budget.charge(adapter.parameters()))
        with self._lock:
            self.check_name_free(adapter.name)
            if prepared is not None:
                always = bool(class_modules(adapter.variant))
                self._keep(entry, prepared, self.read_versions((entry,)), always=always)
            self.entries[adapter.name] = entry

    def register(self, adapters: Mapping[str, StoredAdapter]) -> None:
        """Add adapters on disk; if one cannot be added, add none.

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
            removed = self.find(name)
            # Make a new mapping, so that a caller with the old mapping can restore it.
            self.entries = {key: entry for key, entry in self.entries.items() if key != name}
            self.budget.forget((id(self), removed.serial))
            if removed.adapter is None:
                removed.forms = None  # calls reference composed weights; an error's traceback may reference the entry

    def invalidate(self) -> None:
        """Drop all normal forms, because the model's tensors were replaced; the next use prepares adapters again."""
        with self._lock:
            for entry in self.entries.values():
                entry.forms = None

    def check_name_free(self, name: str) -> None:
        """Raise ``AdapterError`` if the name is taken."""
        if name in self.entries:
            raise AdapterError(
                f"an adapter called '{name}' is already there",
                next_step="give it another name (adapters={name: ...} in compile, name= in add_adapter), or remove "
                "the other by remove_adapter",
                code="adapter_exists",
            )

    def select(self, names: Sequence[str]) -> tuple[PoolEntry, ...]:
        """Return the entries of the given names.

        Raises:
            AdapterNotFound: an adapter was removed or never added.
        """
        return tuple(self.find(name) for name in names)

    def has_versions(self, entries: Sequence[PoolEntry], versions: TensorVersions) -> bool:
        """Return whether no tensor of these entries was written or replaced since the versions were read."""
        now = self.read_versions(entries, versions)
        return versions.versions == now.versions and versions.sums == now.sums

    def read_versions(self, entries: Sequence[PoolEntry], before: TensorVersions = _NEVER) -> TensorVersions:
        """Return the present versions of the tensors of these entries; this is faster with earlier versions.

        torch counts in-place writes, with or without gradients. It does not count writes through ``tensor.data``, as
        research optimizers and moving averages make them, nor writes to a tensor made in inference mode. The sums
        reveal these.
        """
        tensors, versions = list[Tensor](), list[int]()
        for entry in entries:
            versions.append(entry.serial)
            if isinstance(entry.source, Adapter):
                tensors += entry.source.parameters()
        versions += map(id, tensors)
        try:
            versions += map(_VERSION, tensors)
        except RuntimeError:  # a tensor made in inference mode has no count; testing each tensor first would slow calls
            del versions[len(entries) + len(tensors) :]
            versions += [0 if tensor.is_inference() else tensor._version for tensor in tensors]
        if not self._trains or not tensors:
            return TensorVersions(tuple(versions), tuple(tensors))
        addresses = tuple([tensor.data_ptr() for tensor in tensors])
        same = before.sums[: len(tensors)] == addresses and all(map(operator.is_, before.tensors, tensors))
        bits = before.bits if same else tuple([t.detach().view(_INTEGERS[t.element_size()]) for t in tensors])
        with outside_traces():  # one transfer copies the sums from a device
            sums = torch.stack([each.sum().to(bits[0].device) for each in bits]).tolist()
        return TensorVersions(tuple(versions), tuple(tensors), (*addresses, *sums), bits)


_VERSION = operator.attrgetter("_version")
_SERIALS = itertools.count(1)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Item size in bytes -> the integer dtype of that size."""
