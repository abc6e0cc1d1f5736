"""cache: attention over a whole sequence becomes attention of new tokens to a cache.

The pass adds the lengths of the rows and the caches of the layers as inputs, and the caches with the new tokens as
outputs. Positions start after the tokens in the cache. Values that depend only on positions are looked up in tables.
Attention to sequences that do not grow, in an encoder or from a decoder to its encoder, becomes torch's op.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import fx

from lorac.argument_types import Operands
from lorac.errors import Unavailable
from lorac.ir.calls.modalities import BLOCKS
from lorac.ir.graph import attention_ops as attention
from lorac.ir.graph.attention_ops import (
    LOGITS_TO_KEEP,
    NEW_LENGTHS,
    PAST_LENGTHS,
    WITHOUT_CACHE,
    encoder_output_name,
    find_token_input,
    past_names,
    present_name,
    state_name,
)
from lorac.ir.graph.edit import KnownCalls, add_dimension, add_inputs, inline, insert_call, insert_repeated_call
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.nodes import get_example
from lorac.ir.graph.ops import RECURRENCE, STATE_OPERAND
from lorac.ir.graph.passes import Pass, PassResult
from lorac.ir.traces.gate import tracing
from lorac.passes.cache_states import TokenMixer, iter_token_mixers
from lorac.passes.position_tables import tabulate
from lorac.passes.relative_positions import RelativePositions

aten = torch.ops.aten
_CAPACITY_HINT = 16
_HEAD_STEP = 8
"""Head sizes in a cache are multiples of this number, as attention kernels require."""


@final
@dataclass(frozen=True)
class CacheAttention(Pass):
    """Replace attention ops by cached attention; a graph without attention ops stays unchanged."""

    name: ClassVar[str] = "cache"
    reads: ClassVar[Level] = Level.EXPANDED
    leaves: ClassVar[Level] = Level.EXPANDED

    def apply(self, graph: Graph) -> PassResult:
        """Replace the attention ops.

        Raises:
            Unavailable: the model selects tokens for its logits by something other than an index, or a branch mixes
                tokens.
        """
        found = list(graph.find(attention.ATTENTION))
        # The model's layers come first, so that their names do not depend on the adapters.
        causal = (node for node in found if node.args[attention.CAUSAL_OPERAND])
        layers = sorted(causal, key=lambda node: attention.is_branch_attention(str(node.args[-1])))
        for node in found:
            if node not in layers:
                lowered = inline(graph.exported, node, _attention_function(node), list(node.all_input_nodes))[1]
                graph.replace_node(node, lowered[0])
        if not layers and not any(node.args[STATE_OPERAND] is None for node in graph.find(RECURRENCE)):
            return PassResult(bool(found))
        _check_branches(graph)
        ids = find_token_node(graph)
        mixers = list(iter_token_mixers(graph, ids))
        nodes = _add_inputs(graph, layers, mixers, ids)
        distances = RelativePositions(graph, ids, nodes[past_names(0)[0]]) if layers else None
        first = next(node for node in graph.fx.nodes if node.op != "placeholder")
        call = functools.partial(insert_call, graph.exported, first)
        start = call(attention.POSITIONS, ids)
        wide = call(aten.to.dtype, nodes[PAST_LENGTHS], torch.int64)
        positions = call(aten.add.Tensor, start, call(aten.unsqueeze.default, wide, 1))
        for node in graph.find(attention.POSITIONS):
            if node is not start:
                graph.replace_node(node, positions)
        blocks = _offset_blocks(graph, positions)
        presents: dict[str, fx.Node] = {}
        known: KnownCalls = {}
        for layer, node in enumerate(layers):
            names = past_names(layer)
            cache = (*(nodes[name] for name in names), nodes[PAST_LENGTHS], nodes[NEW_LENGTHS], positions)
            assert distances is not None
            own = node.args[attention.BLOCKS_OPERAND]
            seen = blocks[get_example(own).shape[2]] if isinstance(own, fx.Node) else None
            outputs = _insert_cached(graph, known, node, cache, distances.find_bias(node), seen)
            presents |= {present_name(name): output for name, output in zip(names, outputs, strict=True)}
        for number, mixer in enumerate(mixers):
            name = state_name(number)
            presents[present_name(name)] = mixer.replace(graph, nodes[name], nodes[NEW_LENGTHS])
        _select_tokens_per_row(graph)
        limits = tabulate(graph, positions), None if distances is None else distances.longest
        graph.longest = min((limit for limit in limits if limit is not None), default=None)
        if graph.longest is not None:
            last = insert_call(graph.exported, positions.next, aten.clamp.default, positions, None, graph.longest - 1)
            positions.replace_all_uses_with(last, delete_user_cb=lambda user: user is not last)
        graph.add_outputs(presents)
        return PassResult(True)


def _check_branches(graph: Graph) -> None:
    """Refuse branches that mix tokens, because no cache stores their values for earlier tokens."""
    for path, plan in graph.plans.items():
        mixing = next((branch for branch in plan.branches if branch.mixes), None)
        if mixing is not None:
            raise Unavailable(
                f"{mixing.formula.method} at '{path}' mixes tokens by itself, and the program's cache cannot store "
                "its results for earlier tokens",
                next_step="compile with target='eager', which generates without a cache while such an adapter is on, "
                "or with cache=False, to run the program on whole sequences",
            )


def find_token_node(graph: Graph) -> fx.Node:
    """Return the input node that takes the token ids of the growing sequence."""
    named = {node.name: node for node in graph.placeholders()}
    return named[find_token_input(named)]


def _attention_function(node: fx.Node) -> Callable[..., tuple[torch.Tensor]]:
    def function(*values: torch.Tensor) -> tuple[torch.Tensor]:
        given = dict(zip(node.all_input_nodes, values, strict=True))
        operands: Operands = tuple([given.get(a, a) if isinstance(a, fx.Node) else a for a in node.args])
        q, k, v, bias, seen, sinks, _, scale, _, _, softcap, _ = operands
        if softcap or sinks is not None:
            return (attention.attend_with_masks(q, k, v, [seen], bias, sinks, scale, softcap),)
        if bias is not None and seen is not None:
            bias, seen = torch.where(seen, bias, torch.finfo(bias.dtype).min), None
        mask = bias if seen is None else seen
        shared = q.shape[1] != k.shape[1]
        y = aten.scaled_dot_product_attention.default(q, k, v, mask, scale=scale, enable_gqa=shared)
        return (y.transpose(1, 2),)

    return function


def _add_inputs(
    graph: Graph, layers: Sequence[fx.Node], mixers: Sequence[TokenMixer], ids: fx.Node
) -> dict[str, fx.Node]:
    batch = get_example(ids).shape[0]
    capacity = add_dimension(graph.exported, "capacity", _CAPACITY_HINT, 1)
    graph.axes[str(capacity)] = "capacity"
    inputs: dict[str, tuple[Sequence[int | torch.SymInt], torch.dtype]] = {
        PAST_LENGTHS: ((batch,), torch.int32),
        NEW_LENGTHS: ((batch,), torch.int32),
    }
    for layer, node in enumerate(layers):
        key = get_example(node.args[1])
        shape = (batch, key.shape[1], capacity, _cached_head_size(node))
        inputs |= dict.fromkeys(past_names(layer), (shape, key.dtype))
    inputs |= {state_name(i): ((batch, *mixer.shape), mixer.dtype) for i, mixer in enumerate(mixers)}
    nodes = add_inputs(graph.exported, inputs)
    graph.cache_inputs |= {name: node.name for name, node in nodes.items()}
    return nodes


def _offset_blocks(graph: Graph, positions: fx.Node) -> dict[int, fx.Node]:
    """Return number of columns -> positions of each new token's block: first and last (2), or only last (1)."""
    name = graph.cache_inputs.get(encoder_output_name(BLOCKS))
    terms = next((node for node in graph.find(attention.ROWS) if getattr(node.args[0], "name", None) == name), None)
    if name is None or terms is None:
        return {}
    call = functools.partial(insert_call, graph.exported, terms.next)
    both = call(aten.add.Tensor, terms, call(aten.unsqueeze.default, positions, 2))
    return {1: call(aten.slice.Tensor, both, 2, 1, 2), 2: both}


def _cached_head_size(node: fx.Node) -> int:
    """Return the head size of a layer's cache: the larger of keys and values, rounded up for kernels."""
    size = int(max(get_example(operand).shape[3] for operand in node.args[:3]))
    return -(-size // _HEAD_STEP) * _HEAD_STEP


def _insert_cached(
    graph: Graph,
    known: KnownCalls,
    node: fx.Node,
    cache: tuple[fx.Node, ...],
    distances: fx.Node | None,
    blocks: fx.Node | None,
) -> list[fx.Node]:
    q, k, v, _, _, sinks, _, scale, _, window, softcap, module = node.args
    size, insert = _cached_head_size(node), functools.partial(insert_call, graph.exported, node)
    padded = []
    for operand in (q, k, v):  # zeros at the end of a head change no product
        width, parts = get_example(operand).shape[3], [operand]
        for begin in range(width, size, width):
            part = insert(aten.slice.Tensor, operand, 3, 0, min(width, size - begin))
            parts.append(insert(aten.zeros_like.default, part))
        padded.append(operand if len(parts) == 1 else insert(aten.cat.default, parts, 3))
    call = functools.partial(insert_repeated_call, graph.exported, known, node)
    cached = call(attention.CACHED_ATTENTION, *padded, *cache, sinks, distances, blocks, scale, window, softcap, module)
    y, *presents = (call(operator.getitem, cached, index) for index in range(3))
    width = get_example(node).shape[3]
    if width != size:
        y = insert(aten.slice.Tensor, y, 3, 0, width)
    graph.replace_node(node, y)
    return presents


def _select_tokens_per_row(graph: Graph) -> None:
    indices = next((node for node in graph.placeholders() if node.name == LOGITS_TO_KEEP), None)
    if indices is None:
        return
    ids = find_token_node(graph)
    with tracing(), ids.meta["val"].fake_mode:
        shape = (get_example(ids).shape[0], get_example(indices).shape[0])
        indices.meta["val"] = torch.empty(shape, dtype=torch.int64)
    for node in list(indices.users):
        operands: Operands = node.args
        if node.target is not aten.index.Tensor or list(operands[1]) != [None, indices]:
            raise Unavailable(
                "the model picks tokens for its logits in a way that cannot differ from row to row",
                next_step=WITHOUT_CACHE,
            )
        graph.replace_node(node, insert_call(graph.exported, node, attention.ROWS, operands[0], indices))
    sizes = graph.interface.sizes.with_rows(indices.name, (ids.name, 0))
    graph.interface = replace(graph.interface, sizes=sizes)
    arguments, named = graph.exported.example_inputs
    rows = named[ids.name].shape[0]
    given = {**named, indices.name: named[indices.name].expand(rows, -1).contiguous()}
    graph.exported._example_inputs = (arguments, given)  # torch has no public setter
