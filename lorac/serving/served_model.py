"""A served model, its adapters, its scheduler and its row batches, in this process or in Ray's workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, TypeAlias, final

from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.choice import require_adapter
from lorac.serving.refusals import NotAllowed

if TYPE_CHECKING:
    from lorac.runtime.scheduling.scheduler import Scheduler
    from lorac.serving.ray.remote_model import RemoteModel
    from lorac.serving.ray.remote_scheduler import RemoteScheduler
    from lorac.serving.ray.worker_calls import RemoteRows
    from lorac.serving.row_batches import RowBatches
    from lorac.serving.store import AdapterStore
    from lorac.session.compiled import Compiled

ServedModel: TypeAlias = "Compiled | RemoteModel"
RowComputer: TypeAlias = "RowBatches | RemoteRows"
TextScheduler: TypeAlias = "Scheduler | RemoteScheduler"
AdapterSource: TypeAlias = "AdapterStore | SharedAdapters"


def decodes(model: ServedModel) -> bool:
    """Return whether a model continues text, token by token."""
    spec = model.engine.cache_spec(MAIN_GRAPH)
    return spec is not None and not spec.encodes


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
