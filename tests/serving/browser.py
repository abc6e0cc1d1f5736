"""A headless Chromium that tests open pages in, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
WAITS = 60
"""Seconds for a condition to come true."""


class Tab:
    """A tab of the browser.

    Attributes:
        said: messages of its console, and what its scripts threw.
    """

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self._reader, self._writer, self._numbers = reader, writer, itertools.count(1)
        self.said: list[str] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        self._writer.write(json.dumps({"id": number, "method": method, "params": params, **session}).encode() + b"\0")
        self._writer.flush()
        while (answer := self._read()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression of JavaScript."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Return the value of an expression once it is true."""
        until = time.monotonic() + WAITS
        while not (value := self.evaluate(script)):
            assert time.monotonic() < until, f"{script} stays false: {self.evaluate('document.body.innerText')}"
            time.sleep(0.05)
        return value

    def press(self, key: str, **more: Any) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)

    def save_picture(self, path: Path, width: int, height: int, scheme: str = "light") -> None:
        """Write a PNG of what it shows."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 700
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _read(self) -> Any:
        message = bytearray()
        while (byte := self._reader.read(1)) != b"\0":
            assert byte, "the browser has ended"
            message += byte
        return json.loads(message)

    def _note(self, event: Any) -> None:
        if event["method"] in {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}:
            self.said.append(json.dumps(event["params"]))


@contextlib.contextmanager
def open_tab(url: str, profile: Path) -> Iterator[Tab]:
    """Open a page in a browser of its own, and close it after the block."""
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
    connected = [(os.POSIX_SPAWN_DUP2, read_in, 3), (os.POSIX_SPAWN_DUP2, write_out, 4)]  # where it expects them
    quiet = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    browser = os.posix_spawn(command[0], command, os.environ, file_actions=[*connected, quiet])
    os.close(read_in), os.close(write_out)
    with os.fdopen(read_out, "rb") as reader, os.fdopen(write_in, "wb") as writer:
        try:
            tab = Tab(reader, writer)
            tab.call("Page.navigate", url=url)
            yield tab
            tab._session = None
            tab.call("Browser.close")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(browser, signal.SIGTERM)
            os.waitpid(browser, 0)
