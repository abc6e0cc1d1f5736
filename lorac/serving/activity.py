"""The requests for text that a server is answering."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from lorac.serving.active_request import ActiveRequest
from lorac.serving.metrics import ServerMetrics


@final
class Activity:
    """The requests that are being answered. Only the event loop's thread may change it.

    Args:
        metrics: counts them and their tokens.

    Attributes:
        running: the requests, by id.
    """

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self.running: dict[str, ActiveRequest] = {}

    @contextmanager
    def track(self, request: ActiveRequest) -> Iterator[ActiveRequest]:
        """Hold a request among those that are being answered, for a block."""
        self.running[request.id] = request
        try:
            yield request
        finally:
            del self.running[request.id]
            request.reasons += ["cancelled"] * (request.answers - len(request.reasons))
            self._metrics.count_end(request)

    def count_token(self, request: ActiveRequest, gap: float | None) -> None:
        """Count a token of an answer.

        Args:
            gap: seconds since the answer's last one; None for its first.
        """
        request.completion_tokens += 1
        self._metrics.count_token(gap)
        if request.first_token is None:
            request.first_token = request.seconds
            self._metrics.count_first_token(request)

    def of(self, tenant: str) -> list[ActiveRequest]:
        """Return the requests of a tenant."""
        return [request for request in [*self.running.values()] if request.tenant == tenant]
