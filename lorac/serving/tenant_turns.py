"""Threads that work for tenants in turn."""

import collections
from collections.abc import Callable
from typing import TypeVar, final

import anyio
import anyio.to_thread

T = TypeVar("T")


@final
class TenantTurns:
    """Threads that work for tenants in turn: a tenant's requests never hold another's.

    Args:
        threads: how many work at a time.
        own: how many of these work for one tenant.
    """

    def __init__(self, threads: int, own: int = 1) -> None:
        self._all = anyio.CapacityLimiter(threads)
        self._own = collections.defaultdict[str, anyio.CapacityLimiter](lambda: anyio.CapacityLimiter(own))

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Return the result of work for a tenant, which a thread does when it is the tenant's turn."""
        async with self._own[tenant]:
            return await anyio.to_thread.run_sync(work, limiter=self._all)
