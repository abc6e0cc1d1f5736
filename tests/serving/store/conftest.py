"""One store for all tests of one, each of which is a tenant of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from lorac.serving.store import AdapterStore, StoreQuotas
from tests.serving.store.stores import BASE_NAME, compiled

QUOTAS = StoreQuotas(bytes=16_000_000, adapters=3, rank=2, sites=2, uploads_per_minute=20)
_numbers = itertools.count()


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    """The store, whose process for reading starts once."""
    folder = tmp_path_factory.mktemp("store")
    with AdapterStore(compiled(), folder, quotas=QUOTAS, bases=[BASE_NAME], reserved=["base"]) as made:
        yield made


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test is."""
    return f"tenant-{next(_numbers)}"
