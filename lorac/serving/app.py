"""The app: OpenAI's endpoints over a compiled model."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar, final

import anyio
import anyio.to_thread
import fastapi
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, Response

from lorac.errors import AdapterNotFound, Unavailable
from lorac.frontend.components import MAIN_GRAPH
from lorac.runtime.scheduling.scheduler import Scheduler
from lorac.serving import adapter_endpoints, row_endpoints, text_endpoints
from lorac.serving.answers.connection import JsonAnswer
from lorac.serving.guard import NOBODY, Guard
from lorac.serving.images import ImageReader, reads_images
from lorac.serving.metrics import MEDIA_TYPE, ServerMetrics
from lorac.serving.refusals import NotAllowed, install_handlers
from lorac.serving.request_log import RequestLog
from lorac.serving.requests.choices import check_shared_names
from lorac.serving.row_batches import RowBatches
from lorac.serving.served_model import AdapterSource, RowComputer, ServedModel, SharedAdapters, TextScheduler, decodes
from lorac.serving.settings import ServingSettings
from lorac.serving.store import AdapterStore
from lorac.serving.store.reading_process import READERS
from lorac.serving.text_service import TextService
from lorac.serving.tokenizer import find_tokenizer
from lorac.session.compiled import Compiled
from lorac.version import VERSION

T = TypeVar("T")
PAGE = Path(__file__).with_name("page") / "index.html"
_PREPARING, _SENDING = 2, 40
"""The number of threads that prepare requests and answers, if this process computes the model and if workers do."""


@final
class TenantTurns:
    """Threads that tenants share; each tenant uses at most ``own`` of them at a time.

    Args:
        threads: the number of threads.
        own: the most threads for one tenant.
    """

    def __init__(self, threads: int, own: int = 1) -> None:
        self._all = anyio.CapacityLimiter(threads)
        self._own = collections.defaultdict[str, anyio.CapacityLimiter](lambda: anyio.CapacityLimiter(own))

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Run a tenant's work in a thread, as soon as the tenant may use one, and return the result."""
        async with self._own[tenant]:
            return await anyio.to_thread.run_sync(work, limiter=self._all)


def build_app(
    compiled: ServedModel,
    settings: ServingSettings | None = None,
    *,
    store: AdapterSource | None = None,
    scheduler: TextScheduler | None = None,
    rows: RowComputer | None = None,
) -> fastapi.FastAPI:
    """Return a server's app; ``state.scheduler`` runs from the app's startup to its shutdown.

    Args:
        compiled: the model; a decoder is compiled with ``cache=True`` and has a tokenizer.
        settings: default: ``ServingSettings()``.
        store: the adapters that requests may name; None: the model's own.
        scheduler: computes text; default: a ``lorac.Scheduler`` of the model. The app closes it.
        rows: computes rows of outputs for embeddings and predictions; default: the model itself. The app closes it.

    Raises:
        AdapterError: an adapter that all tenants share has the base's name, or a name that reads as a mixture.
        AdapterNotFound: a pinned adapter does not exist.
        Unavailable: the model continues text without a cache, and ``predict`` is not set; or it has no tokenizer
            that decodes token by token.
    """
    given = ServingSettings() if settings is None else settings
    lifespan = functools.partial(_run, scheduler=scheduler, rows=rows)
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.compiled, app.state.settings, app.state.scheduler = compiled, given, None
    app.state.draining = False
    if given.memory is not None and isinstance(compiled, Compiled):
        compiled.memory.limit = given.memory
    app.state.source = SharedAdapters(compiled) if store is None else store
    check_shared_names(app.state.source.names(""), given.base_name)
    app.state.metrics = ServerMetrics(compiled, given.base_name, app.state.source)
    # Downloads have threads of their own, so that a slow source does not delay uploads.
    app.state.readers, app.state.downloads = TenantTurns(READERS), TenantTurns(READERS)
    app.state.image_turns = TenantTurns(READERS)
    # Preparing a request holds the interpreter lock, which the scheduler's thread needs; workers are other processes.
    app.state.turns = TenantTurns(_PREPARING) if scheduler is None else TenantTurns(_SENDING, _SENDING)
    app.state.pinned = [app.state.source.find(NOBODY, name) for name in given.pinned]
    if decodes(compiled):
        find_tokenizer(compiled)
    elif compiled.traits[MAIN_GRAPH].generation is not None and not given.predict:
        raise Unavailable(
            "the model keeps no cache, so it is not served as text",
            next_step="compile it with cache=True, or serve its outputs alone with predict=True",
        )
    if decodes(compiled):
        app.include_router(text_endpoints.router)
    app.include_router(adapter_endpoints.router)
    predicts = not decodes(compiled) if given.predict is None else given.predict
    if predicts and (rows is not None or isinstance(compiled, Compiled)):
        app.include_router(row_endpoints.predict_router)
    if not decodes(compiled) and compiled.tokenizer is not None:
        app.include_router(row_endpoints.text_router)
    if isinstance(store, AdapterStore):
        adapter_endpoints.add_store_endpoints(app, store)
    own_store, app.state.images = store if isinstance(store, AdapterStore) else None, None
    in_base64 = given.max_image_bytes * 4 // 3 if reads_images(compiled) else 0
    app.add_middleware(Guard, settings=given, store=own_store, images=in_base64)
    app.add_middleware(RequestLog, metrics=app.state.metrics)
    install_handlers(app, adapter_endpoints.UploadFields)
    _add_state(app)
    if given.page and PAGE.is_file():
        app.get("/")(lambda: FileResponse(PAGE))
    return app


@contextlib.asynccontextmanager
async def _run(app: fastapi.FastAPI, scheduler: TextScheduler | None, rows: RowComputer | None) -> AsyncIterator[None]:
    """Pin adapters, and run the scheduler and the row batches; at shutdown, finish running requests."""
    state, settings = app.state, app.state.settings
    async with contextlib.AsyncExitStack() as stack:
        if reads_images(state.compiled):
            state.images = ImageReader(settings)
            stack.callback(state.images.close)
        for name in state.pinned:
            stack.enter_context(state.compiled.hold(name))
        if decodes(state.compiled):
            state.scheduler = scheduler or Scheduler(state.compiled, settings.rows, settings.waiting, settings.chunk)
            stack.push_async_callback(run_in_threadpool, state.scheduler.close)
            state.metrics.scheduler = state.scheduler
            state.text = TextService(state.compiled, state.scheduler, state.source, settings, state.metrics)
        if rows is None and isinstance(state.compiled, Compiled):
            rows = RowBatches(state.compiled, settings.rows, settings.waiting)
        if rows is not None:
            state.rows = rows
            stack.push_async_callback(run_in_threadpool, state.rows.close)
        yield


def _add_state(app: fastapi.FastAPI) -> None:
    """Add the endpoints that report a server's state, metrics and models."""
    state, created = app.state, int(time.time())

    def answers() -> bool:
        return state.scheduler is None or state.scheduler.works

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        return Response(status_code=200 if state.draining or await asyncio.to_thread(answers) else 503)

    @app.api_route("/ready", methods=["GET", "HEAD"])
    async def ready() -> Response:
        return Response(status_code=200 if not state.draining and await asyncio.to_thread(answers) else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        if state.settings.keys:
            raise NotAllowed(
                "metrics are of all tenants", next_step="start the server with --metrics-port, and read them there"
            )
        return Response(state.metrics.expose(), media_type=MEDIA_TYPE)

    def describe(tenant: str, name: str) -> dict[str, object]:
        base, pool = state.settings.base_name, state.compiled.pool
        tokens = () if name == base else pool.invocation(state.source.find(tenant, name))
        own = ({} if name == base else {"parent": base}) | ({"invocation_tokens": [*tokens]} if tokens else {})
        return {"id": name, "object": "model", "created": created, "owned_by": "lorac", "root": name, **own}

    @app.get("/v1/models")
    def models(http: fastapi.Request) -> Response:
        names, base = state.source.names(http.state.tenant), state.settings.base_name
        return JsonAnswer({"object": "list", "data": [describe(http.state.tenant, name) for name in (base, *names)]})

    @app.get("/v1/models/{name}")
    def model(name: str, http: fastapi.Request) -> dict[str, object]:
        if name != state.settings.base_name:
            state.source.find(http.state.tenant, name)
        return describe(http.state.tenant, name)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    @app.get("/v1/status")
    def status(http: fastapi.Request) -> dict[str, object]:
        tenant, resident, ready = http.state.tenant, {*state.compiled.pool.resident}, 0
        requests = [one for one in [*state.metrics.running.values()] if one.tenant == tenant]
        running = sum(request.answers for request in requests if request.first_token is not None)
        for name in (names := state.source.names(tenant)):
            with contextlib.suppress(AdapterNotFound):  # it was unloaded meanwhile
                ready += state.source.find(tenant, name) in resident
        return {
            "running": running,
            "waiting": sum(request.answers for request in requests) - running,
            "rows": [request.describe() for request in requests],
            "adapters": {"registered": len(names), "resident": ready},
        }
