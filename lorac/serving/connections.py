"""Limits on the idle time and the number of a uvicorn server's connections."""

import time

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol


def limit_connections(server: uvicorn.Server, seconds: float, most: int) -> None:
    """Close connections that wait too long for a request, and the longest waiting if there are more than ``most``.

    uvicorn itself sets no limit on the time of a request's headers, and does not document how to find its connections.
    They are read from ``Server.server_state.connections``, with the attributes of h11's connections ``cycle`` (the
    current or the last request) and ``transport``.

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
