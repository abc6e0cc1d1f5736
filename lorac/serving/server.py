"""Run an app under uvicorn."""

import contextlib
import logging
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from lorac.errors import OptionError
from lorac.serving.app import build_app
from lorac.serving.draining import DrainingServer, limit_connections
from lorac.serving.request_log import LOGGER
from lorac.serving.settings import ServingSettings, StoreQuotas
from lorac.serving.store import AdapterStore


def run(  # noqa: PLR0913  (a command's options)
    folder: str | Path,
    settings: ServingSettings | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    adapters: str | Path | None = None,
    store: str | Path | None = None,
    bases: Collection[str] = (),
    prepacked: str | Path | None = None,
    metrics_port: int | None = None,
    quotas: StoreQuotas | None = None,
    trust: bool = False,
    ready: Callable[[], object] | None = None,
) -> None:
    """Serve a compiled folder until the process is interrupted; running requests are then finished (``grace``).

    Args:
        adapters: a folder of further adapters, which are read on first use.
        store: a folder for the adapters that tenants upload; None: no uploads.
        bases: names by which PEFT's configurations call the model (``AdapterStore``).
        prepacked: a folder for prepacked weights, as ``lorac.load`` takes it.
        metrics_port: a further port, which serves ``/metrics`` without a key, and nothing else.
        quotas: the quotas of each tenant in the store; default: ``StoreQuotas()``.
        trust: as for ``lorac.load``.
        ready: called once everything is loaded, before the first request.

    Raises:
        ArtifactError: the folder is not a compiled model, or is damaged.
        OptionError: another process listens at a port, or the address is not this machine's.
        LoracError: as ``build_app``.
    """
    import prometheus_client
    import uvicorn

    import lorac

    given = {"port": port} if metrics_port is None else {"port": port, "metrics_port": metrics_port}
    for name, number in given.items():  # before the model is loaded; uvicorn would end the process
        try:
            family = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0][0]
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, number))
        except (OSError, OverflowError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            step = f"give a free {name}=…"
            raise OptionError(f"no server can listen at {host}:{number}: {why}", next_step=step) from error
    LOGGER.addHandler(logging.StreamHandler())
    LOGGER.setLevel(logging.INFO)
    more: dict[str, Any] = {} if prepacked is None else {"prepacked": prepacked}
    compiled = lorac.load(folder, trust=trust, **more)
    if adapters is not None:
        compiled.register(adapters)
    settings = ServingSettings() if settings is None else settings
    if settings.sources and store is None:
        raise OptionError("adapters are loaded by name into a store, and there is none", next_step="give store=… too")
    with contextlib.ExitStack() as stack:
        kept = None
        if store is not None:
            kept = stack.enter_context(
                AdapterStore(
                    compiled, store, quotas=quotas, bases=bases, reserved=[settings.base_name], sources=settings.sources
                )
            )
        app = build_app(compiled, settings, store=kept)
        if metrics_port is not None:
            served, thread = prometheus_client.start_http_server(metrics_port, host, app.state.metrics.registry)
            for end in (served.server_close, thread.join, served.shutdown):  # the last is called first
                stack.callback(end)
        config = uvicorn.Config(app, host=host, port=port, http="h11", access_log=False, server_header=False)
        server = DrainingServer(config, app, settings.grace)
        limit_connections(server, settings.header_timeout, settings.max_connections)
        if ready is not None:
            ready()
        server.run()
