"""A model that workers hold, as a front knows it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, final

from lorac.errors import LoracError
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.choice import ChoiceSpec, parse_choice
from lorac.runtime.scheduling.token_stream import TextToken
from lorac.runtime.traits import ModelTraits
from lorac.target.kv_cache import CacheSpec

Event: TypeAlias = "TextToken | str | LoracError | None"
"""An answer of a worker: None when it has taken a request, its tokens, and why it ended or cannot go on."""


@dataclass(frozen=True)
class SharedFile:
    """An adapter that came while the server runs, where all workers can read it.

    Attributes:
        path: of its file.
        digest: of its bytes.
    """

    path: Path
    digest: str


@final
@dataclass(frozen=True)
class RemoteAdapters(Collection[str]):
    """The names of the workers' adapters. Each worker has its own in memory.

    Attributes:
        names: of the adapters in the model's folder.
        files: name -> the file of an adapter that came while the server runs.
    """

    names: tuple[str, ...]
    files: dict[str, SharedFile] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter([*self.names, *list(self.files)])

    def __len__(self) -> int:
        return len(self.names) + len(self.files)

    @property
    def resident(self) -> tuple[str, ...]:
        """None: a front has no adapters in memory."""
        return ()

    @property
    def read_seconds(self) -> deque[float]:
        """None: a front reads no adapters."""
        return deque()

    def find_files(self, choices: Iterable[ChoiceSpec]) -> dict[str, SharedFile]:
        """Return the files of those adapters of some choices that have one, by name.

        Raises:
            AdapterNotFound, ChoiceError: as for ``compiled.swap``.
        """
        names = {name for choice in choices for name, _ in parse_choice(choice, self)}
        found = {name: self.files.get(name) for name in sorted(names)}
        return {name: file for name, file in found.items() if file is not None}


@final
@dataclass(frozen=True)
class RemoteModel:
    """The model that workers hold, as a front knows it.

    Attributes:
        tokenizer: of the model.
        processor: that has the tokenizer, of a model that reads images; else the tokenizer.
        traits: graph -> its attributes.
        spec: the limits of its cache.
        pool: its adapters.
        limit: of memory; a front has no adapters nor caches.
        used: memory.
    """

    tokenizer: object
    processor: Any
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
