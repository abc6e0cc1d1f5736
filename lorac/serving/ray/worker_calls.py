"""Calls of workers that return one result: rows of a model's outputs, or the size of a registered adapter."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar, cast, final

from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from lorac.errors import LoracError, OverBudget, Unavailable
from lorac.ir.slots.choice import ChoiceSpec
from lorac.serving.ray.remote_model import RemoteAdapters, SharedFile
from lorac.session.registry import AdapterSize

T = TypeVar("T")
WORKER_ENDED = (RayActorError, TaskCancelledError)
"""Errors of calls to a worker that was killed, died with its node, or was scaled away."""
MOST_MOVES = 5
"""How often a request may move to another worker."""


def all_full() -> OverBudget:
    """Return the error for a request for which no worker has room."""
    text = "every worker has as many requests as it may"
    return OverBudget(text, next_step="submit it again later", code="queue_full")


def moved_too_often() -> Unavailable:
    """Return the error for a request that lost a worker too often."""
    text = f"{MOST_MOVES + 1} workers that computed this request ended before it did"
    return Unavailable(text, next_step="submit it again")


async def call_worker(workers: DeploymentHandle, method: str, *given: object) -> object:
    """Call a method of a worker, and again of another worker if the first dies; return the result.

    Raises:
        LoracError: the method returned it, or no worker has room.
    """
    for _ in range(MOST_MOVES + 1):
        try:
            found: object = await getattr(workers, method).remote(*given)
        except BackPressureError as error:
            raise all_full() from error
        except WORKER_ENDED:
            continue
        if isinstance(found, LoracError):
            raise found
        return found
    raise moved_too_often()


@final
class RemoteRows:
    """Computation of rows by calls of workers.

    Args:
        pool: the names and files of the adapters.
        workers: the handle of the workers.
    """

    def __init__(self, pool: RemoteAdapters, workers: DeploymentHandle) -> None:
        self._pool, self._workers = pool, workers

    async def compute(
        self, inputs: Mapping[str, Tensor], choices: Sequence[ChoiceSpec], tenant: str = ""
    ) -> Mapping[str, Tensor]:
        """Return the rows of every output, by name; raises as ``RowBatches.compute``."""
        files = self._pool.find_files(choices)
        return cast("Mapping[str, Tensor]", await call_worker(self._workers, "compute", inputs, choices, files, tenant))

    def close(self) -> None:
        """Do nothing: workers end by themselves."""


@final
class RemoteAdapterHolder:
    """The workers' model, as a store of adapters sees it.

    One worker checks an adapter; the others read it when a request needs it. A worker removes the adapter when its file
    is gone.

    Args:
        pool: the names and files of the adapters.
        workers: the handle of the workers.
        loop: runs the calls; its own thread must not register adapters.
    """

    def __init__(self, pool: RemoteAdapters, workers: DeploymentHandle, loop: asyncio.AbstractEventLoop) -> None:
        self.pool, self._workers, self._loop = pool, workers, loop

    def refuse_baked(self) -> None:
        """Do nothing: with a store, a worker of a baked model refuses to start."""

    def register_file(self, path: Path, name: str, digest: str) -> AdapterSize:
        """Register an adapter of one file; raises as ``Compiled.register_file``."""
        file = SharedFile(path, digest)
        call = call_worker(self._workers, "register", name, file)
        size = cast(AdapterSize, asyncio.run_coroutine_threadsafe(call, self._loop).result())
        self.pool.files[name] = file
        return size

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter that was registered."""
        del self.pool.files[name]
