"""The deployments of a server on Ray."""

from __future__ import annotations

import asyncio

import pydantic
from ray import serve
from ray.serve.handle import DeploymentHandle

from lorac.errors import OptionError
from lorac.serving.app import build_app
from lorac.serving.ray.remote_model import RemoteModel
from lorac.serving.ray.remote_scheduler import RemoteScheduler
from lorac.serving.ray.worker import Worker
from lorac.serving.ray.worker_calls import RemoteAdapterHolder, RemoteRows
from lorac.serving.settings import ServingSettings
from lorac.serving.store import AdapterStore


class RayServer(pydantic.BaseModel, extra="forbid"):
    """The description of a server on Ray.

    Attributes:
        folder: the compiled model, at a path that every node has.
        settings: the server's settings; ``rows`` and ``waiting`` count per worker.
        workers: the number of workers, or (fewest, most): Ray adds workers while requests wait.
        store: a folder for the adapters that tenants upload, which all nodes share; empty: no uploads. A server with a
            store has one front.
        bases: names by which PEFT's configurations call the model (``AdapterStore``).
        adapters_per_worker: the most choices of adapters that Ray routes to one worker while others have room.
        fronts: the number of replicas that answer clients.
        trust: as for ``lorac.load``, by every worker.
        worker_options: Ray's options of a worker's process, such as ``{"num_cpus": 4}``.
    """

    folder: str
    settings: ServingSettings = ServingSettings()
    workers: pydantic.PositiveInt | tuple[pydantic.PositiveInt, pydantic.PositiveInt] = 1
    store: str = ""
    bases: list[str] = []
    adapters_per_worker: pydantic.PositiveInt = 16
    fronts: pydantic.PositiveInt = 1
    trust: bool = False
    worker_options: dict[str, float] = pydantic.Field(default_factory=lambda: {"num_cpus": 1.0})

    @pydantic.model_validator(mode="after")
    def check_fronts(self) -> RayServer:
        """Check that a store has one front."""
        if self.store and self.fronts > 1:
            raise OptionError(
                f"a server with a store has one front, and fronts is {self.fronts}",
                next_step="leave out fronts or store",
            )
        return self


def build_server(server: RayServer) -> serve.Application:
    """Return the server for ``serve.run``. In a shell: ``serve run lorac.serving.ray:build_server folder=FOLDER``."""
    settings = server.settings
    worker = serve.deployment(Worker).options(
        max_ongoing_requests=settings.rows + settings.waiting,
        max_queued_requests=settings.waiting,
        ray_actor_options=server.worker_options,
        health_check_period_s=2,
        **_scale(server.workers, settings.rows),
    )
    front = serve.deployment(serve.ingress()(Front)).options(
        num_replicas=server.fronts, max_ongoing_requests=1 << 14, ray_actor_options={"num_cpus": 0.1}
    )
    bound = worker.bind(
        server.folder, settings, server.adapters_per_worker, grows=bool(server.store), trust=server.trust
    )
    return front.bind(bound, server)


def _scale(workers: int | tuple[int, int], rows: int) -> dict[str, object]:
    """Return Ray's options for the number of workers. Workers are added when a worker has more requests than rows."""
    if isinstance(workers, int):
        return {"num_replicas": workers}
    fewest, most = workers
    limits = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": rows}
    return {"autoscaling_config": limits}


class Front:
    """A replica that answers clients.

    Args:
        workers: the handle of the workers, which compute.
        server: the server's description.
    """

    async def __init__(self, workers: DeploymentHandle, server: RayServer) -> None:  # type: ignore[misc]  # Ray awaits it
        self._workers, self._server = workers, server
        self._store: AdapterStore | None = None
        self._model: RemoteModel = await workers.describe.remote()
        if server.store:
            self._store = await asyncio.to_thread(
                AdapterStore,
                RemoteAdapterHolder(self._model.pool, workers, asyncio.get_running_loop()),
                server.store,
                bases=server.bases,
                reserved=[server.settings.base_name],
                sources=server.settings.sources,
            )

    def __serve_build_asgi_app__(self) -> object:
        settings, workers = self._server.settings, self._server.workers
        most = workers if isinstance(workers, int) else workers[1]
        loop = asyncio.get_running_loop()
        scheduler = RemoteScheduler(self._model, self._workers, most * settings.rows, loop)
        rows = RemoteRows(self._model.pool, self._workers)
        return build_app(self._model, settings, store=self._store, scheduler=scheduler, rows=rows)
