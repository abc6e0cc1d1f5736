"""The adapters a compiled model holds, each with its prepared form."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from lorac.errors import AdapterExists
from lorac.ir.slots.choice import require_known
from lorac.ir.slots.site import Prepared


class HasTensors(Protocol):
    """What the pool asks of an adapter."""

    name: str

    def parameters(self) -> Any:
        """Every tensor of the adapter."""


class Pool(Mapping[str, Prepared]):
    """Name -> prepared adapter. Preparing again happens only when an adapter's tensors were written since.

    Args:
        prepare: adapter -> its normal forms.
    """

    def __init__(self, prepare: Callable[[Any], Prepared]) -> None:
        self._prepare = prepare
        self._lock = threading.RLock()
        self._entries: dict[str, tuple[Any, Prepared, tuple[int, ...]]] = {}

    def __getitem__(self, name: str) -> Prepared:
        with self._lock:
            require_known(name, self._entries)
            adapter, prepared, version = self._entries[name]
            now = versions(adapter)
            if now != version:
                prepared = self._prepare(adapter)
                self._entries[name] = (adapter, prepared, now)
            return prepared

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def adapters(self) -> dict[str, Any]:
        """Name -> adapter."""
        with self._lock:
            return {name: adapter for name, (adapter, _, _) in self._entries.items()}

    def prepare(self, adapter: Any) -> Prepared:
        """An adapter's normal forms, without registering it."""
        self.refuse_taken(adapter.name)
        return self._prepare(adapter)

    def put(self, adapter: Any, prepared: Prepared) -> None:
        """Register a prepared adapter.

        Raises:
            AdapterExists: the name is taken.
        """
        with self._lock:
            self.refuse_taken(adapter.name)
            self._entries = {**self._entries, adapter.name: (adapter, prepared, versions(adapter))}

    def drop(self, name: str) -> Prepared:
        """Forget an adapter; returns what was prepared of it."""
        with self._lock:
            require_known(name, self._entries)
            prepared = self._entries[name][1]
            self._entries = {key: entry for key, entry in self._entries.items() if key != name}
            return prepared

    def refuse_taken(self, name: str) -> None:
        """Raise ``AdapterExists`` where the name is taken."""
        if name in self._entries:
            raise AdapterExists(
                f"an adapter called '{name}' is already there",
                next_step="remove_adapter it first, or give add_adapter another name=",
            )

    def named(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        """The adapters of these names.

        Raises:
            AdapterNotFound: one of them is not there, or not any more.
        """
        with self._lock:
            for name in names:
                require_known(name, self._entries)
            return tuple(self._entries[name][0] for name in names)


def versions(adapter: HasTensors) -> tuple[int, ...]:
    """The write counts of an adapter's tensors."""
    try:
        return tuple([tensor._version for tensor in adapter.parameters()])
    except RuntimeError:  # a tensor made in inference mode counts nothing; asking each first would slow every call
        return tuple([0 if tensor.is_inference() else tensor._version for tensor in adapter.parameters()])


def written(adapters: Sequence[Any]) -> tuple[int, ...]:
    """Changes whenever a tensor of one of these adapters is written."""
    return tuple(itertools.chain.from_iterable(map(versions, adapters)))
