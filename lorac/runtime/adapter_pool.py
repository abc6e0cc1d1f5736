"""The adapters a compiled model holds, each with its prepared form."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lorac.errors import AdapterError
from lorac.ir.slots.choice import require_adapter
from lorac.ir.slots.plans import PreparedAdapter


class TensorHolder(Protocol):
    """What the pool asks of an adapter."""

    name: str

    def parameters(self) -> Any:
        """Every tensor of the adapter."""


class AdapterPool(Mapping[str, PreparedAdapter]):
    """Name -> prepared adapter. Preparing again happens only when an adapter's tensors were written since.

    Args:
        prepare: adapter -> its normal forms.

    Attributes:
        entries: name -> the adapter, what was prepared of it, and how its tensors were then.
    """

    def __init__(self, prepare: Callable[[Any], PreparedAdapter]) -> None:
        self._prepare = prepare
        self._lock = threading.RLock()
        self.entries: dict[str, tuple[Any, PreparedAdapter, TensorVersions]] = {}

    def __getitem__(self, name: str) -> PreparedAdapter:
        with self._lock:
            require_adapter(name, self.entries)
            adapter, prepared, then = self.entries[name]
            now = read_versions((adapter,))
            if now.versions != then.versions:
                prepared = self._prepare(adapter)
                self.entries[name] = (adapter, prepared, now)
            return prepared

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def adapters(self) -> dict[str, Any]:
        """Name -> adapter."""
        with self._lock:
            return {name: adapter for name, (adapter, _, _) in self.entries.items()}

    def prepare(self, adapter: Any) -> PreparedAdapter:
        """An adapter's normal forms, without registering it."""
        self.refuse_taken(adapter.name)
        return self._prepare(adapter)

    def put(self, adapter: Any, prepared: PreparedAdapter) -> None:
        """Register a prepared adapter.

        Raises:
            AdapterError: the name is taken.
        """
        with self._lock:
            self.refuse_taken(adapter.name)
            self.entries = {**self.entries, adapter.name: (adapter, prepared, read_versions((adapter,)))}

    def put_later(self, adapter: Any) -> None:
        """Register an adapter that is prepared when it is first asked for.

        Raises:
            AdapterError: the name is taken.
        """
        with self._lock:
            self.refuse_taken(adapter.name)
            self.entries = {**self.entries, adapter.name: (adapter, PreparedAdapter({}, {}), TensorVersions((), ()))}

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        with self._lock:
            require_adapter(name, self.entries)
            self.entries = {key: entry for key, entry in self.entries.items() if key != name}

    def forget_prepared(self) -> None:
        """Prepare every adapter anew when it is next asked for: the model has other tensors now."""
        with self._lock:
            self.entries = {name: (entry[0], entry[1], TensorVersions((), ())) for name, entry in self.entries.items()}

    def refuse_taken(self, name: str) -> None:
        """Raise ``AdapterError`` where the name is taken."""
        if name in self.entries:
            raise AdapterError(
                f"an adapter called '{name}' is already there",
                next_step="name it otherwise, compile by adapters={name: ...} and add_adapter by name=, "
                "or remove_adapter the other first",
                code="adapter_exists",
            )

    def named(self, names: tuple[str, ...]) -> tuple[Any, ...]:
        """The adapters of these names.

        Raises:
            AdapterNotFound: one of them is not there, or not any more.
        """
        with self._lock:
            for name in names:
                require_adapter(name, self.entries)
            return tuple(self.entries[name][0] for name in names)


@dataclass(frozen=True)
class TensorVersions:
    """How often the tensors of some adapters were written, and which tensors those are.

    Attributes:
        versions: each tensor's identity and write count; equal where none was written and none exchanged.
        tensors: kept, so that no other tensor gets the identity of one of them.
    """

    versions: tuple[int, ...]
    tensors: tuple[Any, ...]


def read_versions(adapters: Sequence[TensorHolder]) -> TensorVersions:
    """How the tensors of adapters are now.

    Writes are those that torch counts: by operations in place, with gradients or without. It counts none through
    ``tensor.data``, through NumPy, or to a tensor made in inference mode.
    """
    tensors = tuple(itertools.chain.from_iterable(adapter.parameters() for adapter in adapters))
    try:
        counts = [tensor._version for tensor in tensors]
    except RuntimeError:  # a tensor made in inference mode counts nothing; asking each first would slow every call
        counts = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    return TensorVersions((*map(id, tensors), *counts), tensors)
