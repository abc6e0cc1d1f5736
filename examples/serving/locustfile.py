"""Load on a server: users who chat, each time with one of its adapters, and read the answer as it comes.

    locust -f examples/serving/locustfile.py --headless --users 16 --spawn-rate 4 --run-time 60s --host http://127.0.0.1:8000

Three rows of the table are about answers: the time to the first token, between tokens, and of the whole answer. API_KEY
and TOKENS (of an answer) are read from the environment.
"""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

from locust import HttpUser, between, events, task
from locust.exception import RescheduleTask

TOKENS = int(os.environ.get("TOKENS", "64"))
QUESTIONS = (
    "Which tables hold the orders of last week?",
    "Write a sentence about rain.",
    "Summarise: the meeting was moved to Tuesday, and nobody told the caterer.",
)


class Chatter(HttpUser):
    """Asks, reads the answer, and thinks for a moment."""

    wait_time = between(0, 0.5)

    def on_start(self) -> None:
        if key := os.environ.get("API_KEY"):
            self.client.headers["authorization"] = f"Bearer {key}"
        self.models = [model["id"] for model in self.client.get("/v1/models").json()["data"]]

    @task
    def chat(self) -> None:
        body = {
            "model": random.choice(self.models),
            "messages": [{"role": "user", "content": random.choice(QUESTIONS)}],
            "max_tokens": TOKENS,
            "stream": True,
        }
        begun = time.perf_counter()
        with self.client.post("/v1/chat/completions", json=body, stream=True, catch_response=True) as answer:
            if answer.status_code == 429:  # too many wait: counted, and tried again later
                answer.failure("429")
                raise RescheduleTask
            times = [time.perf_counter() for event in answer.iter_lines() if _has_text(event, answer)]
        for name, seconds in _intervals(begun, times):
            events.request.fire(request_type="stream", name=name, response_time=1000 * seconds, response_length=0)


def _has_text(event: bytes, answer: Any) -> bool:
    """Whether an event of the stream brings text; one that reports an error fails the request."""
    data = event.removeprefix(b"data: ")
    if not data or data == b"[DONE]":
        return False
    found = json.loads(data)
    if "error" in found:
        answer.failure(found["error"]["message"])
        return False
    return bool(found["choices"] and found["choices"][0]["delta"].get("content"))


def _intervals(begun: float, times: list[float]) -> list[tuple[str, float]]:
    if not times:
        return []
    between_tokens = [("between tokens", (times[-1] - times[0]) / (len(times) - 1))] if len(times) > 1 else []
    return [("first token", times[0] - begun), *between_tokens, ("whole answer", times[-1] - begun)]
