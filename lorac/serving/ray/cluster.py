"""The deployments of a server on Ray."""

from __future__ import annotations

import asyncio

import pydantic
from ray import serve
from ray.serve.handle import DeploymentHandle

from lorac.serving.app import build_app
from lorac.serving.ray.remote_model import RemoteModel
from lorac.serving.ray.remote_scheduler import RemoteScheduler
from lorac.serving.ray.worker import Worker
from lorac.serving.settings import ServingSettings


class RayServer(pydantic.BaseModel, extra="forbid"):
    """A server on Ray.

    Attributes:
        folder: the compiled model, at a path that every node has.
        settings: of the server; ``rows`` and ``waiting`` are those of one worker.
        workers: how many workers, or the fewest and the most; in between, one is added while requests wait.
        adapters_per_worker: how many choices of adapters a worker is kept to while others have room.
        fronts: how many replicas answer clients.
        worker_options: Ray's options of a worker's process, such as ``{"num_cpus": 4}``.
    """

    folder: str
    settings: ServingSettings = ServingSettings()
    workers: pydantic.PositiveInt | tuple[pydantic.PositiveInt, pydantic.PositiveInt] = 1
    adapters_per_worker: pydantic.PositiveInt = 16
    fronts: pydantic.PositiveInt = 1
    worker_options: dict[str, float] = pydantic.Field(default_factory=lambda: {"num_cpus": 1.0})


def build_server(server: RayServer) -> serve.Application:
    """Return what ``serve.run`` takes. In a shell: ``serve run lorac.serving.ray:build_server folder=FOLDER``."""
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
    most = server.workers if isinstance(server.workers, int) else server.workers[1]
    return front.bind(worker.bind(server.folder, settings, server.adapters_per_worker), settings, most)


def _scale(workers: int | tuple[int, int], rows: int) -> dict[str, object]:
    """Return Ray's options for a number of workers. A worker with more requests than rows has some that wait."""
    if isinstance(workers, int):
        return {"num_replicas": workers}
    fewest, most = workers
    limits = {"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": rows}
    return {"autoscaling_config": limits}


class Front:
    """Answers clients.

    Args:
        workers: compute.
        settings: of the server.
        most: workers.
    """

    async def __init__(self, workers: DeploymentHandle, settings: ServingSettings, most: int) -> None:  # type: ignore[misc]  # Ray awaits it
        self._workers, self._settings, self._rows = workers, settings, most * settings.rows
        self._model: RemoteModel = await workers.describe.remote()

    def __serve_build_asgi_app__(self) -> object:
        scheduler = RemoteScheduler(self._model, self._workers, self._rows, asyncio.get_running_loop())
        return build_app(self._model, self._settings, scheduler=scheduler)
