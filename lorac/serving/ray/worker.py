"""The replica of a server on Ray that holds the model and computes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Mapping, Sequence

from ray import serve
from ray.util import metrics
from torch import Tensor

import lorac
from lorac.errors import LoracError
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.choice import ChoiceSpec
from lorac.runtime.scheduling.scheduler import Scheduler
from lorac.runtime.scheduling.token_stream import TextRequest, TextToken, TokenStream
from lorac.serving.ray.remote_model import Event, RemoteAdapters, RemoteModel, SharedFile
from lorac.serving.requests.grammar import GrammarMask, Grammars
from lorac.serving.row_batches import RowBatches
from lorac.serving.served_model import decodes
from lorac.serving.settings import ServingSettings
from lorac.session.compiled import Compiled
from lorac.session.registry import AdapterSize

_GAUGES = {
    "requests_running": "Requests at work in a worker.",
    "requests_waiting": "Requests that wait in a worker.",
    "memory_bytes": "Memory of adapters, keys and values in a worker.",
    "adapters_registered": "Adapters that a worker knows.",
}


class Worker:
    """A replica that holds the compiled model, and computes.

    Args:
        folder: the compiled model.
        settings: the server's settings.
        adapters: the most choices of adapters that Ray routes to it while other workers have room.
        grows: whether adapters may be added while it runs.
        trust: as for ``lorac.load``.
    """

    def __init__(
        self, folder: str, settings: ServingSettings, adapters: int, *, grows: bool, trust: bool = False
    ) -> None:
        self._compiled = lorac.load(folder, trust=trust)
        if settings.memory is not None:
            self._compiled.memory.limit = settings.memory
        if grows:
            self._compiled.refuse_baked()
        self._files = AdapterFiles(self._compiled)
        self._scheduler: Scheduler | None = None
        if decodes(self._compiled):
            self._scheduler = Scheduler(self._compiled, settings.rows, settings.waiting, settings.chunk)
        self._rows = RowBatches(self._compiled, settings.rows, settings.waiting)
        self._held = contextlib.ExitStack()
        for name in settings.pinned:
            self._held.enter_context(self._compiled.hold(name))

        async def name_choice(name: str) -> str:  # the engine loads adapters; Ray only learns which worker has which
            return name

        self._claim = serve.multiplexed(max_num_models_per_replica=adapters)(name_choice)
        self._gauges = {name: metrics.Gauge(f"lorac_{name}", description=text) for name, text in _GAUGES.items()}

    def describe(self) -> RemoteModel:
        """Return the description of the model that a front needs."""
        return RemoteModel(
            tokenizer=self._compiled.tokenizer,
            processor=self._compiled.processor,
            traits={**self._compiled.traits},
            spec=self._compiled.engine.cache_spec(MAIN_GRAPH),
            pool=RemoteAdapters(self._files.own),
        )

    async def answer(self, request: TextRequest, files: Mapping[str, SharedFile]) -> AsyncIterator[Event]:
        """Yield a request's events: None on acceptance, its tokens, then the finish reason or the error.

        Args:
            files: name -> file of its adapters that were added while the server runs.
        """
        await self._claim(serve.get_multiplexed_model_id())
        try:
            stream = await asyncio.to_thread(self._submit, request, files)
        except LoracError as error:
            yield error
            return
        yield None
        async with contextlib.aclosing(aiter(stream)) as tokens:
            async for event in _read(tokens, stream):
                yield event

    def _submit(self, request: TextRequest, files: Mapping[str, SharedFile]) -> TokenStream:
        assert self._scheduler is not None  # fronts send text requests only to models that generate text
        self._files.add(files)
        processors = request.options.get("logits_processor", ())
        assert isinstance(processors, Sequence)
        masks = [processor for processor in processors if isinstance(processor, GrammarMask)]
        for mask in masks:
            self._grammars.bind(mask)
        return self._scheduler.submit(request)

    @functools.cached_property
    def _grammars(self) -> Grammars:
        return Grammars.of(self._compiled)

    async def compute(
        self, inputs: Mapping[str, Tensor], choices: Sequence[ChoiceSpec], files: Mapping[str, SharedFile], tenant: str
    ) -> Mapping[str, Tensor] | LoracError:
        """Return rows of the model's outputs, or the error.

        Args:
            files: as for ``answer``.
        """
        try:
            await asyncio.to_thread(self._files.add, files)
            return await self._rows.compute(inputs, choices, tenant)
        except LoracError as error:
            return error

    async def register(self, name: str, file: SharedFile) -> AdapterSize | LoracError:
        """Register an adapter; return its size, or the error."""
        try:
            return await asyncio.to_thread(self._files.register, name, file)
        except LoracError as error:
            return error

    def check_health(self) -> None:
        """Report the load, and remove adapters whose files are gone; Ray calls it every two seconds."""
        self._files.drop_missing()
        running, waiting = (0, 0) if self._scheduler is None else self._scheduler.load
        values = (running, waiting, self._compiled.memory.used, len(self._compiled.pool))
        for gauge, value in zip(self._gauges.values(), values, strict=True):
            gauge.set(value)

    def __del__(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        self._rows.close()
        self._held.close()


class AdapterFiles:
    """The adapters that were added to a worker while it runs. Threads may share it.

    Args:
        compiled: the worker's model.

    Attributes:
        own: the names of the adapters in the model's folder.
    """

    def __init__(self, compiled: Compiled) -> None:
        self._compiled, self.own = compiled, tuple(compiled.pool)
        self._known: dict[str, SharedFile] = {}
        self._lock = threading.Lock()

    def add(self, files: Mapping[str, SharedFile]) -> None:
        """Register the adapters that are not registered yet; raises as ``Compiled.register_file``."""
        with self._lock:
            for name in files.keys() - self._known.keys():
                self._register(name, files[name])

    def register(self, name: str, file: SharedFile) -> AdapterSize:
        """Register an adapter in place of an earlier adapter of its name; raises as ``Compiled.register_file``."""
        with self._lock:
            if name in self._known:
                self._remove(name)
            return self._register(name, file)

    def drop_missing(self) -> None:
        """Remove adapters whose files are gone; running requests keep them until they end."""
        with self._lock:
            for name in [name for name, file in self._known.items() if not file.path.exists()]:
                self._remove(name)

    def _register(self, name: str, file: SharedFile) -> AdapterSize:
        size = self._compiled.register_file(file.path, name, file.digest)
        self._known[name] = file
        return size

    def _remove(self, name: str) -> None:
        self._compiled.remove_adapter(name)
        del self._known[name]


async def _read(tokens: AsyncIterator[TextToken], stream: TokenStream) -> AsyncIterator[Event]:
    """Yield a request's tokens, then its finish reason or the error."""
    try:
        async for token in tokens:
            yield token
        yield stream.reason
    except LoracError as error:
        yield error
