"""The parts of a compiled model, and of those who compute for it, that a server uses, wherever they are."""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.choice import ChoiceSpec
from lorac.runtime.scheduling.token_stream import TextRequest, TokenStream
from lorac.runtime.traits import ModelTraits
from lorac.target.kv_cache import CacheSpec


class ServedAdapters(Collection[str], Protocol):
    """The names of a model's adapters."""

    @property
    def resident(self) -> Collection[str]:
        """Those that are ready in memory."""

    @property
    def read_seconds(self) -> deque[float]:
        """Times of reading adapters from disk for their use, until they are taken out."""


class ServedEngine(Protocol):
    """The engine that runs the model."""

    def cache_spec(self, graph: str) -> CacheSpec | None: ...


class MemoryUse(Protocol):
    """The memory of adapters and caches."""

    @property
    def limit(self) -> int | None: ...

    @property
    def used(self) -> int: ...


class ServedModel(Protocol):
    """A compiled model, or a description of one that workers hold."""

    @property
    def tokenizer(self) -> object: ...

    @property
    def traits(self) -> Mapping[str, ModelTraits]: ...

    @property
    def pool(self) -> ServedAdapters: ...

    @property
    def engine(self) -> ServedEngine: ...

    @property
    def memory(self) -> MemoryUse: ...

    def hold(self, choice: ChoiceSpec) -> AbstractContextManager[object]: ...


def decodes(model: ServedModel) -> bool:
    """Return whether a model continues text, token by token."""
    spec = model.engine.cache_spec(MAIN_GRAPH)
    return spec is not None and not spec.encodes


class RowComputer(Protocol):
    """Computes rows of a model's inputs: ``RowBatches``, or one that has them computed elsewhere."""

    async def compute(
        self, inputs: Mapping[str, Tensor], choices: Sequence[ChoiceSpec], tenant: str = ""
    ) -> Mapping[str, Tensor]: ...

    def close(self) -> None: ...


class TextScheduler(Protocol):
    """Computes text: ``lorac.Scheduler``, or one whose rows are elsewhere."""

    @property
    def compiled(self) -> ServedModel: ...

    @property
    def component(self) -> str: ...

    @property
    def rows(self) -> int: ...

    @property
    def load(self) -> tuple[int, int]: ...

    @property
    def chunk(self) -> int | None: ...

    @property
    def works(self) -> bool: ...

    @property
    def nbytes(self) -> Mapping[str, int]: ...

    def submit_all(self, requests: Sequence[TextRequest]) -> list[TokenStream]: ...

    def close(self) -> None: ...
