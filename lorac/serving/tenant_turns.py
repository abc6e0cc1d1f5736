"""Threads that tenants share."""

import collections
from collections.abc import Callable
from typing import TypeVar, final

import anyio
import anyio.to_thread

T = TypeVar("T")


@final
class TenantTurns:
    """Threads that tenants share; each tenant uses at most ``own`` of them at a time.

    Args:
        threads: the number of threads.
        own: the most threads for one tenant.
    """

    def __init__(self, threads: int, own: int = 1) -> None:
        self._all = anyio.CapacityLimiter(threads)
        self._own = collections.defaultdict[str, anyio.CapacityLimiter](lambda: anyio.CapacityLimiter(own))

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Run a tenant's work in a thread, as soon as the tenant may use one, and return the result."""
        async with self._own[tenant]:
            return await anyio.to_thread.run_sync(work, limiter=self._all)
