"""Run an app under uvicorn."""

from __future__ import annotations

import logging
from pathlib import Path

from lorac.serving.app import build_app
from lorac.serving.settings import ServingSettings


def run(
    folder: str | Path,
    settings: ServingSettings | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    adapters: str | Path | None = None,
) -> None:
    """Serve a compiled folder until the process is interrupted; requests at work are then finished.

    Args:
        adapters: a folder of further adapters, read when they are used.

    Raises:
        ArtifactError: the folder holds no compiled model, or a damaged one.
        LoracError: as ``build_app``.
    """
    import uvicorn

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import lorac

    compiled = lorac.load(folder)
    if adapters is not None:
        compiled.register(adapters)
    app = build_app(compiled, settings)
    uvicorn.run(app, host=host, port=port, access_log=False, server_header=False, timeout_graceful_shutdown=30)
