"""Answers in JSON."""

import io
import json
from typing import final

from fastapi.responses import JSONResponse


@final
class JsonAnswer(JSONResponse):
    """JSON that is made in a thread, where no other thread waits for more than a part of it.

    The encoder in C would keep the interpreter, and with it the event loop, to the end of the text.
    """

    def render(self, content: object) -> bytes:
        written = io.StringIO()
        encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        written.writelines(encoder.iterencode(content))
        return written.getvalue().encode()
