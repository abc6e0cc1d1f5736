"""The base class of engines whose graphs may have a cache: plain calls, generation steps, encoders and towers."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from lorac.backends.onnx.engine import LoadedGraph, OnnxEngine, OnnxProgram, convert_inputs
from lorac.backends.onnx.kv_cache import (
    BufferedCache,
    CacheLayout,
    full_sequence_step,
    mask_name,
    run_decode_step,
    split_padding,
)
from lorac.frontend.components import check_component, get_encoder_graph_name
from lorac.ir.calls.call import Call
from lorac.ir.graph.attention_ops import LOGITS_TO_KEEP, PAST_LENGTHS, is_encoder_output
from lorac.ir.graph.feeds import convert_input, make_empty_cache
from lorac.target.backend import OptionsT
from lorac.target.engine import CallResult
from lorac.target.kv_cache import CacheSpec, DecodeStep, KeyValueCache
from lorac.target.placed_engine import LoadedProgram, translate_program_errors


class CachingGraph(LoadedGraph, Protocol):
    """One graph of the program, which may have a cache.

    Attributes:
        outputs: the names of its outputs.
        cache: the layout of its cache; None if it has no cache.
    """

    cache: CacheLayout | None

    @property
    def outputs(self) -> Sequence[str]: ...


CachingGraphT = TypeVar("CachingGraphT", bound=CachingGraph)


class CachingEngine(OnnxEngine[CachingGraphT, OptionsT], Generic[CachingGraphT, OptionsT]):
    """An engine for a program whose graphs may have caches."""

    def __init__(self, program: LoadedProgram[CachingGraphT, OptionsT]) -> None:
        super().__init__(program)
        for name, graph in self.graphs.items():
            if graph.cache is None:
                continue
            if (encoder := self.graphs.get(get_encoder_graph_name(name))) is not None:
                graph.cache = graph.cache.behind((*encoder.interface.inputs, *encoder.interface.constants))
            else:  # a call passes only tokens and their mask, whatever other inputs the model has
                tokens = graph.cache.token_input
                arguments = (tokens, mask_name(tokens))
                interface = dataclasses.replace(self.interfaces[name], arguments=arguments)
                self.interfaces = {**self.interfaces, name: interface}

    def outputs(self, graph: str, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return copies of a graph's outputs; without a past, a graph with a cache reads an empty one."""
        cache = self.graphs[graph].cache
        if cache is not None and PAST_LENGTHS not in inputs:
            empty = make_empty_cache(cache.shapes, inputs[cache.token_input], cache.encoder_outputs)
            known = self.graphs[graph].dtypes  # a library may drop an input that no op reads
            inputs = {**{name: value for name, value in empty.items() if name in known}, **inputs}
        return super().outputs(graph, tensors, inputs)

    def cache_spec(self, graph: str) -> CacheSpec | None:
        layout = self.graphs[check_component(graph, self.graphs)].cache
        return None if layout is None else layout.spec

    def new_cache(self, graph: str, rows: int, capacity: int) -> KeyValueCache:
        layout = self.graphs[check_component(graph, self.graphs)].cache
        return (
            super().new_cache(graph, rows, capacity)
            if layout is None
            else BufferedCache[Any](layout, rows, capacity, self.memory_budget)
        )


@dataclass(frozen=True, eq=False)
class CachingProgram(OnnxProgram):
    """A program whose graphs may have caches, with the tensors of one choice of adapters."""

    engine: CachingEngine[Any, Any]

    @abstractmethod
    def run_step(
        self, graph: str, cache: BufferedCache[Any], inputs: Mapping[str, Tensor], output: str, logits: Tensor
    ) -> None:
        """Run a graph over the buffers of a cache, and leave the new tokens' entries in the buffers.

        Args:
            inputs: all other inputs, by name.
            output: the name of the output with the logits.
            logits: the memory for the logits.
        """

    def run(self, graph: str, call: Call) -> CallResult:
        """Call a graph; one with a cache gets whole sequences, and its cache is discarded afterwards."""
        loaded = self.engine.graphs[graph]
        layout = loaded.cache
        if layout is None:
            return super().run(graph, call)
        tokens = layout.token_input
        encoded = Call(kwargs={name: call.kwargs[name] for name in layout.spec.encodes if name in call.kwargs})
        given, counts = split_padding({n: v for n, v in call.kwargs.items() if n not in encoded.kwargs}, tokens)
        ids = convert_input(tokens, given[tokens], loaded.dtypes[tokens])
        layout.check_length(max(counts, default=0) + self.virtual_tokens)
        step = full_sequence_step(ids, counts)
        positions = {LOGITS_TO_KEEP: step.wanted} if LOGITS_TO_KEEP in loaded.dtypes else {}
        loaded.interface.check(Call(kwargs={**given, **positions}))
        cache = self.new_cache(graph, *ids.shape)
        answered = self._encode(graph, cache, encoded) if layout.spec.encodes else {}
        logits = self.decode(graph, cache, step)
        logits[torch.arange(ids.shape[1]) >= torch.tensor(counts)[:, None]] = 0
        as_numpy = isinstance(given[tokens], np.ndarray)
        outputs: list[object] = [
            logits.numpy() if as_numpy else logits,
            *(None for _ in loaded.interface.extra_outputs),
        ]
        answered_outputs = {name: value.numpy() if as_numpy else value for name, value in answered.items()}
        output, _ = loaded.interface.with_values(answered_outputs).build_output(outputs, as_tuple=call.wants_tuple)
        return CallResult(output)

    def decode(self, graph: str, cache: KeyValueCache, step: DecodeStep) -> Tensor:
        assert isinstance(cache, BufferedCache)
        with translate_program_errors():
            return run_decode_step(cache, step, lambda *operands: self.run_step(graph, cache, *operands))

    def compute_features(self, graph: str, inputs: Mapping[str, object]) -> Tensor:
        name = get_encoder_graph_name(graph)
        tower = self.engine.graphs[name]
        with translate_program_errors():
            given = tower.interface.check(tower.interface.bind((), inputs))
            return tower.interface.drop_checks(self.run_graph(name, convert_inputs(tower, given)))[0]

    def encode(self, graph: str, cache: KeyValueCache, inputs: Mapping[str, object]) -> None:
        self._encode(graph, cache, Call(kwargs=inputs))

    def _encode(self, graph: str, cache: KeyValueCache, call: Call) -> dict[str, Tensor]:
        """Run the encoder as ``encode`` does; return its outputs that are also outputs of the model, by name."""
        assert isinstance(cache, BufferedCache)
        name = get_encoder_graph_name(graph)
        encoder = self.engine.graphs[name]
        with translate_program_errors():
            outputs = self.run_graph(name, convert_inputs(encoder, encoder.interface.check(call)))
        named = dict(zip(encoder.outputs, encoder.interface.drop_checks(outputs), strict=False))
        cache.set_encoder_outputs({name: value for name, value in named.items() if is_encoder_output(name)})
        return {name: value for name, value in named.items() if not is_encoder_output(name)}
