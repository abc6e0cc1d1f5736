"""The workers' model as a front sees it: without weights, adapters' tensors and caches."""

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
"""An event of a request at a worker: None on acceptance, a token, the finish reason, or the error."""


@dataclass(frozen=True)
class SharedFile:
    """The file of an adapter that was added while the server runs, on storage that all workers read.

    Attributes:
        path: the path of the file.
        digest: the digest of its bytes (``OpenFile.digest``).
    """

    path: Path
    digest: str


@final
@dataclass(frozen=True)
class RemoteAdapters(Collection[str]):
    """The names of the workers' adapters. Workers differ in which adapters they have in memory.

    Attributes:
        names: the names of the adapters in the model's folder.
        files: name -> the file of an adapter that was added while the server runs.
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
        """Always empty, since a front has no adapters in memory."""
        return ()

    @property
    def read_seconds(self) -> deque[float]:
        """Always empty, since a front reads no adapters."""
        return deque()

    def find_files(self, choices: Iterable[ChoiceSpec]) -> dict[str, SharedFile]:
        """Return name -> file of the adapters in the choices that were added while the server runs.

        Raises:
            AdapterNotFound, ChoiceError: as for ``compiled.swap``.
        """
        names = {name for choice in choices for name, _ in parse_choice(choice, self)}
        found = {name: self.files.get(name) for name in sorted(names)}
        return {name: file for name, file in found.items() if file is not None}


@final
@dataclass(frozen=True)
class RemoteModel:
    """The workers' model as a front sees it, with the attributes of ``Compiled`` that an app reads.

    Attributes:
        tokenizer: the model's tokenizer.
        processor: the processor of a model that reads images; else the tokenizer.
        traits: graph -> its attributes.
        spec: the limits of the model's cache; None: no cache.
        pool: the names of the adapters.
        limit: the limit on memory; None, since a front has neither adapters nor caches.
        used: the bytes of memory in use; 0.
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
        """This object, which has ``cache_spec``."""
        return self

    @property
    def memory(self) -> RemoteModel:
        """This object, which has ``limit`` and ``used``."""
        return self

    def cache_spec(self, graph: str) -> CacheSpec | None:
        """Return the limits of a graph's cache."""
        return self.spec if graph == MAIN_GRAPH else None

    def hold(self, choice: ChoiceSpec) -> contextlib.AbstractContextManager[object]:
        """Do nothing: each worker pins its adapters itself."""
        return contextlib.nullcontext()
