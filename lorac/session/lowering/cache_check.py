"""A program with a cache held against the one without: texts that come in parts answer as whole ones (invariant 8).

What a trace of a whole text does not show is that a token's answer depends on what came before by attention alone: a
model that mixes tokens otherwise, or counts positions by itself, goes wrong where its text comes in parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorac.errors import CaptureError
from lorac.ir.graph.attention_ops import (
    LOGITS_TO_KEEP,
    NEW_LENGTHS,
    PAST_LENGTHS,
    WITHOUT_CACHE,
    find_token_input,
    is_encoder_output,
    present_name,
)
from lorac.ir.graph.feeds import cache_input_shapes, collect_slot_tensors, make_empty_cache
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.interpreter import read_example_inputs, relative_error, run_graph
from lorac.ir.sites import BaseReader
from lorac.ir.slots.composition import ComposedWeights, fill_slots

_TOLERATED_ROUNDINGS = 100
"""How many roundings of its size an answer may be off: thirty layers leave a dozen."""


class CacheCheck:
    """What a captured graph answers for the last token of each row of its example.

    Args:
        graph: at level host.
    """

    def __init__(self, graph: Graph) -> None:
        self._inputs = read_example_inputs(graph, graph.interface.inputs)
        self._text = find_token_input(self._inputs)
        if LOGITS_TO_KEEP in self._inputs:
            self._inputs[LOGITS_TO_KEEP] = torch.tensor([self._inputs[self._text].shape[1] - 1])
        self._whole = run_graph(graph, self._inputs)[0][:, -1]

    def check(self, halves: Sequence[Graph], base: BaseReader) -> None:
        """Hold the same graph, with caches now, against that, its rows growing by different parts.

        Args:
            halves: lowered: the graph that grows, and that of its encoder, if it has one.
            base: reads base weights.

        Raises:
            CaptureError: it answers otherwise, or not at all.
        """
        graph, *encoders = halves
        try:
            memory = {name: value for encoder in encoders for name, value in self._encoded(encoder, base).items()}
            last = self._last(graph, memory, _idle_slots(graph, base))
        except Exception as error:  # the model's own steps: what they raise for a part of a text is theirs to choose
            raise _cache_differs(graph, f"does not run ({str(error).partition(chr(10))[0]})") from error
        # What mixes tokens besides attention may do so by little: nothing but roundings is let pass.
        rounding = _TOLERATED_ROUNDINGS * torch.finfo(last.dtype).eps
        if not relative_error(last, self._whole) <= rounding:
            raise _cache_differs(graph, "answers otherwise")

    def _encoded(self, encoder: Graph, base: BaseReader) -> dict[str, Tensor]:
        """What an encoder makes for its decoder."""
        given = {name: self._inputs[name] for name in encoder.interface.inputs}
        answered = dict(
            zip(encoder.interface.outputs, run_graph(encoder, given, _idle_slots(encoder, base)), strict=True)
        )
        return {name: value for name, value in answered.items() if is_encoder_output(name)}

    def _last(self, graph: Graph, memory: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> Tensor:
        """What a graph with caches answers for the last token of each row."""
        ids = self._inputs[self._text]
        rows, length = ids.shape
        held = make_empty_cache(cache_input_shapes(graph), ids)
        first = torch.tensor([1 + row % (length - 1) for row in range(rows)], dtype=torch.int32)
        for past, new in ((torch.zeros_like(first), first), (first, length - first)):
            given = {**held, **memory, PAST_LENGTHS: past, NEW_LENGTHS: new, self._text: _next_tokens(ids, past, new)}
            if LOGITS_TO_KEEP in self._inputs:
                given[LOGITS_TO_KEEP] = (new.to(torch.int64) - 1)[:, None]
            answered = run_graph(graph, given, slots)
            presents = dict(
                zip(graph.interface.extra_outputs, answered[-len(graph.interface.extra_outputs) :], strict=True)
            )
            held |= {name: presents[present_name(name)] for name in cache_input_shapes(graph)}
        return answered[0][:, 0] if LOGITS_TO_KEEP in self._inputs else answered[0][torch.arange(rows), new.long() - 1]


def _idle_slots(graph: Graph, base: BaseReader) -> dict[str, Tensor]:
    """Slots in which nothing is active."""
    return collect_slot_tensors(graph.slots, graph.plans, fill_slots(graph.plans, ComposedWeights(()), base))


def _cache_differs(graph: Graph, what: str) -> CaptureError:
    return CaptureError(
        f"the graph '{graph.name}' {what} where its text comes in parts: something besides attention mixes tokens, or "
        "positions are counted by the model itself",
        next_step=WITHOUT_CACHE,
        code="capture_differs",
    )


def _next_tokens(ids: Tensor, past: Tensor, new: Tensor) -> Tensor:
    """The next tokens of each row, padded on the right."""
    places = past[:, None].long() + torch.arange(int(new.max()))
    return ids.gather(1, places.clamp(max=ids.shape[1] - 1))
