"""Where a server finds the adapters that requests name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, Protocol, final

from lorac.ir.slots.choice import require_adapter
from lorac.serving.refusals import NotAllowed
from lorac.session.compiled import Compiled


class NamedAdapter(Protocol):
    """An adapter as a tenant sees it."""

    @property
    def name(self) -> str:
        """Its name in requests."""


class AdapterSource(Protocol):
    """The adapters of each tenant, which come and go while the server runs."""

    def adapters(self, tenant: str) -> Sequence[NamedAdapter]:
        """Return the adapters that a tenant may use."""

    def find(self, tenant: str, name: str) -> str:
        """Return the name that an adapter of a tenant has in the compiled model.

        Raises:
            AdapterNotFound: the tenant has no such adapter.
        """

    def load(self, tenant: str, name: str, path: str) -> object:
        """Add an adapter from a path inside the store."""

    def upload(self, tenant: str, name: str, file: BinaryIO) -> object:
        """Add an adapter from a file that a tenant sends."""

    def unload(self, tenant: str, name: str) -> object:
        """Remove an adapter; requests at work keep it to their end."""


@dataclass(frozen=True)
class SharedAdapter:
    """An adapter of the compiled model itself, which every tenant may use."""

    name: str


@final
class SharedAdapters:
    """The adapters of the compiled model itself, for every tenant; a store may bring each tenant more.

    Args:
        compiled: the compiled model.
        store: the tenants' own adapters; without one, nothing can be loaded nor unloaded.
    """

    def __init__(self, compiled: Compiled, store: AdapterSource | None = None) -> None:
        self._pool, self._store = compiled.pool, store
        # What a store adds to the compiled model later belongs to one tenant.
        self._own = None if store is None else frozenset(compiled.pool)

    def adapters(self, tenant: str) -> Sequence[NamedAdapter]:
        shared = [SharedAdapter(name) for name in self._shared()]
        return [*shared, *(self._store.adapters(tenant) if self._store is not None else ())]

    def find(self, tenant: str, name: str) -> str:
        if name in self._shared():
            return name
        if self._store is not None:
            return self._store.find(tenant, name)
        require_adapter(name, self._pool)
        return name

    def load(self, tenant: str, name: str, path: str) -> object:
        return self._require_store().load(tenant, name, path)

    def upload(self, tenant: str, name: str, file: BinaryIO) -> object:
        return self._require_store().upload(tenant, name, file)

    def unload(self, tenant: str, name: str) -> object:
        return self._require_store().unload(tenant, name)

    def _shared(self) -> Sequence[str]:
        return [name for name in self._pool if self._own is None or name in self._own]

    def _require_store(self) -> AdapterSource:
        return _refuse() if self._store is None else self._store


def _refuse() -> NoReturn:
    raise NotAllowed("no store is configured", next_step="start the server with a store: lorac serve --store FOLDER")
