"""Answers in JSON."""

import io
import json
from typing import final

from fastapi.responses import JSONResponse


@final
class JsonAnswer(JSONResponse):
    """A JSON response, encoded piece by piece in Python so that other threads can run in between.

    The encoder in C would hold the interpreter lock, and so block the event loop, until the whole text is encoded.
    """

    def render(self, content: object) -> bytes:
        written = io.StringIO()
        encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        written.writelines(encoder.iterencode(content))
        return written.getvalue().encode()
