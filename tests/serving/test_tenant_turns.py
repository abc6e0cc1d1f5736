"""Threads work for tenants in turn."""

import collections
import threading
import time

import anyio
import pytest

from lorac.serving.app import TenantTurns


@pytest.mark.parametrize(("threads", "own"), [(3, 1), (3, 2), (2, 5)])
def test_a_tenant_has_its_own_threads_and_all_have_some(threads: int, own: int) -> None:
    lock, at_work, most = threading.Lock(), collections.Counter[str](), collections.Counter[str]()

    def work(tenant: str) -> str:
        with lock:
            at_work.update([tenant, "all"])
            most.update({name: at_work[name] - most[name] for name in (tenant, "all") if at_work[name] > most[name]})
        time.sleep(0.02)
        with lock:
            at_work.subtract([tenant, "all"])
        return tenant

    async def main() -> None:
        turns = TenantTurns(threads, own)
        async with anyio.create_task_group() as group:
            for tenant in "aaaabbbbcccc":
                group.start_soon(turns.run, tenant, lambda tenant=tenant: work(tenant))

    anyio.run(main)
    # Whether later tenants reach it too depends on when threads end.
    assert (most["all"], most["a"]) == (threads, min(own, threads))
    assert max(most["b"], most["c"]) <= min(own, threads)
