"""Check a program with a cache against the program without: a sequence in two parts must give the same logits.

A trace of a whole sequence does not show whether tokens depend on earlier tokens through attention alone. A model that
mixes tokens in another way, or counts positions itself, gives wrong outputs when a sequence comes in parts.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorac.errors import CaptureError
from lorac.ir.calls.modalities import BLOCKS, leave_block
from lorac.ir.graph.attention_ops import (
    CACHED_ATTENTION,
    LOGITS_TO_KEEP,
    NEW_LENGTHS,
    PAST_LENGTHS,
    WITHOUT_CACHE,
    encoder_output_name,
    find_token_input,
    is_encoder_output,
    present_name,
)
from lorac.ir.graph.feeds import cache_input_shapes, collect_slot_tensors, make_empty_cache
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.interpreter import read_example_inputs, relative_error, run_graph
from lorac.ir.graph.nodes import find_module_path
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.composition import ComposedWeights, fill_slots

_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")
"""The path of the outermost numbered module around another one."""
_TOLERATED_ROUNDINGS = 100
"""Allowed error in units of the dtype's epsilon. Thirty layers give about a dozen."""


class CacheCheck:
    """A check of a graph with a cache, against the logits of each row's last token without a cache.

    Args:
        graph: the captured graph, at level host, with its example inputs.
    """

    def __init__(self, graph: Graph) -> None:
        self._inputs = read_example_inputs(graph, graph.interface.inputs)
        self._ids_name = find_token_input(self._inputs)
        if LOGITS_TO_KEEP in self._inputs:
            self._inputs[LOGITS_TO_KEEP] = torch.tensor([self._inputs[self._ids_name].shape[1] - 1])
        self._expected = run_graph(graph, self._inputs)[0][:, -1]

    def check(self, lowered: Sequence[Graph], base: BaseReader) -> None:
        """Run the example inputs in two parts, split at another token in each row, and compare the last logits.

        Args:
            lowered: the same graph with a cache, then the graph of its encoder, if it has one.
            base: reads base weights.

        Raises:
            CaptureError: the logits differ, or the graph does not run.
        """
        graph, *encoders = lowered
        try:
            outputs = {name: value for encoder in encoders for name, value in self._encode(encoder, base).items()}
            last = self._decode_in_parts(graph, outputs, _idle_slots(graph, base))
        except Exception as error:  # the model's own code may raise any error for a part of a sequence
            raise _cache_differs(graph, f"does not run ({str(error).partition(chr(10))[0]})") from error
        if any(plan.site.own_size for plan in graph.plans.values()):  # -inf: the model's own layer lacks the output
            last = last.where(last != -math.inf, self._expected)
        # Mixing tokens besides attention may change little, so nothing but rounding is tolerated.
        tolerance = _TOLERATED_ROUNDINGS * torch.finfo(last.dtype).eps
        if not relative_error(last, self._expected) <= tolerance:
            raise _cache_differs(graph, "answers otherwise")

    def _encode(self, encoder: Graph, base: BaseReader) -> dict[str, Tensor]:
        """Return the outputs of an encoder that its decoder reads."""
        inputs = {name: self._inputs[name] for name in encoder.interface.inputs}
        values = run_graph(encoder, inputs, _idle_slots(encoder, base))
        outputs = zip(encoder.interface.outputs, values, strict=True)
        return {name: value for name, value in outputs if is_encoder_output(name)}

    def _decode_in_parts(
        self, graph: Graph, encoder_outputs: Mapping[str, Tensor], slots: Mapping[str, Tensor]
    ) -> Tensor:
        """Return the logits of each row's last token; row i comes in parts of 1 + i and of the remaining tokens."""
        ids, presents = self._inputs[self._ids_name], graph.interface.extra_outputs
        rows, length = ids.shape
        cache = make_empty_cache(cache_input_shapes(graph), ids)
        ends, blocks = [1 + row % (length - 1) for row in range(rows)], encoder_outputs.get(encoder_output_name(BLOCKS))
        if blocks is not None:
            ends = [leave_block(own, end, ahead=True) for own, end in zip(blocks, ends, strict=True)]
        first = torch.tensor(ends, dtype=torch.int32)
        for past, new in ((torch.zeros_like(first), first), (first, length - first)):
            inputs = {**cache, **encoder_outputs, PAST_LENGTHS: past, NEW_LENGTHS: new}
            positions = past[:, None].long() + torch.arange(int(new.max()))  # padded on the right
            inputs[self._ids_name] = ids.gather(1, positions.clamp(max=length - 1))
            if LOGITS_TO_KEEP in self._inputs:
                inputs[LOGITS_TO_KEEP] = (new.to(torch.int64) - 1)[:, None]
            outputs = run_graph(graph, inputs, slots)
            new_entries = dict(zip(presents, outputs[-len(presents) :], strict=True))
            cache |= {name: new_entries[present_name(name)] for name in cache_input_shapes(graph)}
        logits: Tensor = outputs[0]
        return logits[:, 0] if LOGITS_TO_KEEP in self._inputs else logits[torch.arange(rows), new.long() - 1]


def _idle_slots(graph: Graph, base: BaseReader) -> dict[str, Tensor]:
    """Return the slots of a graph with no adapter active."""
    return collect_slot_tensors(graph.slots, graph.plans, fill_slots(graph.plans, ComposedWeights(()), base))


def _cache_differs(graph: Graph, how: str) -> CaptureError:
    attends: dict[str, bool] = {}  # by the path of a repeated layer
    for node in graph.fx.nodes:
        if found := _LAYER.match(find_module_path(node)):
            attends[found[0]] = attends.get(found[0], False) or node.target is CACHED_ATTENTION
    layer = next((path for path, has_attention in attends.items() if not has_attention), None)
    where = "" if layer is None else f" (as '{layer}' may, which has no attention)"
    return CaptureError(
        f"the graph '{graph.name}' {how} where its text comes in parts: something besides attention mixes tokens"
        f"{where}, or the model counts positions itself",
        next_step=WITHOUT_CACHE,
        code="capture_differs",
    )
