"""Where a server finds the adapters that requests name."""

from collections.abc import Mapping, Sequence
from typing import BinaryIO, NoReturn, Protocol, final

from lorac.ir.slots.choice import require_adapter
from lorac.serving.refusals import NotAllowed
from lorac.serving.served_model import ServedModel


class AdapterSource(Protocol):
    """The adapters of each tenant, which come and go while the server runs."""

    def names(self, tenant: str) -> Sequence[str]:
        """Return the names of the adapters that a tenant may use."""

    def find(self, tenant: str, name: str) -> str:
        """Return the name that an adapter of a tenant has in the compiled model.

        Raises:
            AdapterNotFound: the tenant has no such adapter.
        """

    def load(self, tenant: str, name: str, path: str) -> object:
        """Add an adapter from a path inside the store."""

    def upload(self, tenant: str, name: str, files: Mapping[str, BinaryIO], *, base: str | None = None) -> object:
        """Add an adapter from files that a tenant sends.

        Args:
            files: file name -> content.
            base: the hash of the base weights, if the files do not record it.
        """

    def unload(self, tenant: str, name: str) -> object:
        """Remove an adapter; requests at work keep it to their end."""


@final
class SharedAdapters:
    """The adapters of the compiled model itself, for every tenant; none can be loaded nor unloaded.

    Args:
        compiled: the compiled model.
    """

    def __init__(self, compiled: ServedModel) -> None:
        self._pool = compiled.pool

    def names(self, tenant: str) -> Sequence[str]:
        return [*self._pool]

    def find(self, tenant: str, name: str) -> str:
        require_adapter(name, self._pool)
        return name

    def load(self, tenant: str, name: str, path: str) -> object:
        return _refuse()

    def upload(self, tenant: str, name: str, files: Mapping[str, BinaryIO], *, base: str | None = None) -> object:
        return _refuse()

    def unload(self, tenant: str, name: str) -> object:
        return _refuse()


def _refuse() -> NoReturn:
    raise NotAllowed("no store is configured", next_step="start the server with a store: build_app(..., store=...)")
