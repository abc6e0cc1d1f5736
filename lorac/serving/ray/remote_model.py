"""A model that workers hold, as a front knows it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.choice import ChoiceSpec
from lorac.runtime.traits import ModelTraits
from lorac.target.kv_cache import CacheSpec


class RemoteAdapters(tuple[str, ...]):
    """The names of the workers' adapters. Each worker has its own in memory."""

    resident: tuple[str, ...] = ()

    @property
    def read_seconds(self) -> deque[float]:
        """None: a front reads no adapters."""
        return deque()


@final
@dataclass(frozen=True)
class RemoteModel:
    """The model that workers hold, as a front knows it.

    Attributes:
        tokenizer: of the model.
        traits: graph -> its attributes.
        spec: the limits of its cache.
        pool: its adapters.
        limit: of memory; a front has no adapters nor caches.
        used: memory.
    """

    tokenizer: object
    traits: Mapping[str, ModelTraits]
    spec: CacheSpec | None
    pool: RemoteAdapters
    limit: int | None = None
    used: int = 0

    @property
    def engine(self) -> RemoteModel:
        """Itself: it knows the limits of the cache."""
        return self

    @property
    def memory(self) -> RemoteModel:
        """Itself: it knows the use of memory."""
        return self

    def cache_spec(self, graph: str) -> CacheSpec | None:
        """Return the limits of a graph's cache."""
        return self.spec if graph == MAIN_GRAPH else None

    def hold(self, choice: ChoiceSpec) -> contextlib.AbstractContextManager[object]:
        """Do nothing: workers hold pinned adapters."""
        return contextlib.nullcontext()
