"""A server of files, as any is, on a port of its own."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with further headers, and notes the paths."""

    def __init__(self, *args: Any, headers: dict[str, str], paths: list[str], **more: Any) -> None:
        self.more, self.paths = headers, paths
        super().__init__(*args, **more)

    def do_GET(self) -> None:
        self.paths.append(self.path)
        super().do_GET()

    def end_headers(self) -> None:
        for name, value in self.more.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *args: object) -> None:
        """Write no log."""


@contextlib.contextmanager
def serve(folder: Path, **headers: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder for a block; its address, and the paths that were asked for."""
    paths: list[str] = []
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    handler = functools.partial(_Handler, directory=str(folder), headers=named, paths=paths)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", paths
        finally:
            server.shutdown()
