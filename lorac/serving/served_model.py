"""Types of a served model, its scheduler and its row batches, in this process or in Ray's workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from lorac.frontend.components import MAIN_GRAPH

if TYPE_CHECKING:
    from lorac.runtime.scheduling.scheduler import Scheduler
    from lorac.serving.ray.remote_model import RemoteModel
    from lorac.serving.ray.remote_scheduler import RemoteScheduler
    from lorac.serving.ray.worker_calls import RemoteRows
    from lorac.serving.rows.row_batches import RowBatches
    from lorac.session.compiled import Compiled

ServedModel: TypeAlias = "Compiled | RemoteModel"
RowComputer: TypeAlias = "RowBatches | RemoteRows"
TextScheduler: TypeAlias = "Scheduler | RemoteScheduler"


def decodes(model: ServedModel) -> bool:
    """Return whether a model continues text, token by token."""
    spec = model.engine.cache_spec(MAIN_GRAPH)
    return spec is not None and not spec.encodes
