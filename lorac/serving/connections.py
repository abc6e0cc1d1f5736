"""Limits on the connections of a uvicorn server: how long they may be idle, and how many there may be."""

import time

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


def limit_connections(server: uvicorn.Server, seconds: float, most: int) -> None:
    """Close connections that are without a request for too long; if there are too many, those without one longest.

    uvicorn itself sets no limit on the time of a request's headers, and has no documented access to its connections.
    This reads ``Server.server_state.connections``, and of connections that h11 parses ``cycle`` (the current or the
    last request) and ``transport``.

    Args:
        seconds: the longest time without a request, before the first and between requests.
        most: the most connections.
    """
    waiting: dict[H11Protocol, tuple[object, float]] = {}

    async def sweep() -> None:
        nonlocal waiting
        now, found = time.monotonic(), dict[H11Protocol, tuple[object, float]]()
        connections = [one for one in server.server_state.connections if isinstance(one, H11Protocol)]
        for connection in connections:
            cycle = connection.cycle
            if not cycle or cycle.response_complete:
                known = waiting.get(connection)
                found[connection] = known if known is not None and known[0] is cycle else (cycle, now)
        excess = len(connections) - most
        for place, connection in enumerate(sorted(found, key=lambda one: found[one][1])):
            if place < excess or now - found[connection][1] > seconds:
                connection.transport.close()
        waiting = found

    server.config.callback_notify, server.config.timeout_notify = sweep, 0
