"""Sources in which a server finds the adapters that requests name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, TypeAlias, final

from lorac.ir.slots.choice import require_adapter
from lorac.serving.refusals import NotAllowed

if TYPE_CHECKING:
    from lorac.serving.served_model import ServedModel
    from lorac.serving.store import AdapterStore


AdapterSource: TypeAlias = "AdapterStore | SharedAdapters"


@final
class SharedAdapters:
    """The compiled model's own adapters, for every tenant; requests can neither load nor unload adapters.

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

    def unload(self, tenant: str, name: str) -> object:
        return _refuse()


def _refuse() -> NoReturn:
    raise NotAllowed("no store is configured", next_step="start the server with a store: build_app(..., store=...)")
