"""cache: attention of a whole text becomes attention of what is new to what a cache holds.

The graph gets the lengths of its rows and the caches of its layers as inputs, and the caches with what is new in them
as outputs. Positions count on from what a row holds. What depends on positions alone is looked up in a table. Attention
to what does not grow, an encoder's own and a decoder's to what was encoded, is attention as torch has it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import fx

from lorac.errors import Unavailable
from lorac.ir.graph import attention_ops as attending
from lorac.ir.graph.attention_ops import (
    LOGITS_TO_KEEP,
    NEW_LENGTHS,
    PAST_LENGTHS,
    WITHOUT_CACHE,
    find_token_input,
    past_names,
    present_name,
)
from lorac.ir.graph.edit import add_dimension, add_inputs, inline, insert_call, insert_like
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.passes import Pass, PassResult
from lorac.ir.tracing import tracing
from lorac.passes.position_tables import tabulate
from lorac.passes.relative_positions import RelativePositions

aten = torch.ops.aten
_HINT = 16
_STEP = 8
"""Sizes of heads in a cache are multiples of this: kernels of attention take no others."""


@final
@dataclass(frozen=True)
class CacheAttention(Pass):
    """Put caches in where attention was captured as one op; any other graph stays as it is."""

    name: ClassVar[str] = "cache"
    reads: ClassVar[Level] = Level.EXPANDED
    leaves: ClassVar[Level] = Level.EXPANDED

    def apply(self, graph: Graph) -> PassResult:
        """As the class says.

        Raises:
            Unavailable: the model picks the tokens for its logits otherwise than by an index, or a branch mixes tokens
                by itself.
        """
        found = list(graph.find(attending.ATTENTION))
        # The host's come first, so that they are called alike whatever adapters there are.
        layers = sorted((node for node in found if node.args[attending.CAUSAL_OPERAND]), key=_is_branchs)
        for node in found:
            if node not in layers:
                _lower(graph, node)
        if not layers:
            return PassResult(bool(found))
        _refuse_mixing(graph)
        ids = find_token_node(graph)
        nodes = _add_inputs(graph, layers, ids)
        distances = RelativePositions(graph, str(ids.meta["val"].shape[1]), nodes[past_names(0)[0]])
        positions = _count_on(graph, ids, nodes[PAST_LENGTHS])
        presents: dict[str, fx.Node] = {}
        known: dict[Any, Any] = {}
        for layer, node in enumerate(layers):
            names = past_names(layer)
            kept = (*(nodes[name] for name in names), nodes[PAST_LENGTHS], nodes[NEW_LENGTHS], positions)
            own = _cached(graph, known, node, kept, distances.of(node))
            presents |= {present_name(name): part for name, part in zip(names, own, strict=True)}
        _pick_rows(graph)
        graph.longest = tabulate(graph, positions)
        if graph.longest is not None:
            _keep_within(graph, positions, graph.longest)
        graph.add_outputs(presents)
        return PassResult(True)


def _refuse_mixing(graph: Graph) -> None:
    """Refuse branches that give a token something of those before it, of which there would be no cache."""
    for path, plan in graph.plans.items():
        mixing = next((branch for branch in plan.branches if branch.mixes), None)
        if mixing is not None:
            raise Unavailable(
                f"{mixing.formula.method} at '{path}' mixes tokens by itself, and the program's cache has no place for "
                "what it makes of those that came before",
                next_step="compile with target='eager', which generates without a cache while such an adapter is on, "
                "or with cache=False, to run the program on whole texts",
            )


def _is_branchs(node: fx.Node) -> bool:
    return attending.is_branch_attention(str(node.args[-1]))


def find_token_node(graph: Graph) -> fx.Node:
    """The input with the tokens of the text that grows."""
    named = {node.name: node for node in graph.placeholders()}
    return named[find_token_input(named)]


def _lower(graph: Graph, node: fx.Node) -> None:
    """Torch's own op in the place of an attention to what does not grow."""
    (answered,) = inline(graph.exported, node, _attention_of(node), list(node.all_input_nodes))[1]
    node.replace_all_uses_with(answered)
    graph.fx.erase_node(node)


def _attention_of(node: fx.Node) -> Callable[..., tuple[torch.Tensor]]:
    """What an attention computes of its operands that are values, in torch's ops."""

    def computed(*values: torch.Tensor) -> tuple[torch.Tensor]:
        given = dict(zip(node.all_input_nodes, values, strict=True))
        operands: list[Any] = [given.get(a, a) if isinstance(a, fx.Node) else a for a in node.args]
        q, k, v, bias, seen, sinks, scale, _, _, softcap, _ = operands
        if softcap or sinks is not None:
            return (attending.attend_with_masks(q, k, v, [seen], bias, sinks, scale, softcap),)
        if bias is not None and seen is not None:
            bias, seen = torch.where(seen, bias, torch.finfo(bias.dtype).min), None
        mask = bias if seen is None else seen
        shared = q.shape[1] != k.shape[1]
        y = aten.scaled_dot_product_attention.default(q, k, v, mask, scale=scale, enable_gqa=shared)
        return (y.transpose(1, 2),)

    return computed


def _add_inputs(graph: Graph, layers: Sequence[fx.Node], ids: fx.Node) -> dict[str, fx.Node]:
    batch = ids.meta["val"].shape[0]
    capacity = add_dimension(graph.exported, "capacity", _HINT, 1)
    graph.axes[str(capacity)] = "capacity"
    wanted: dict[str, tuple[Any, torch.dtype]] = {
        PAST_LENGTHS: ((batch,), torch.int32),
        NEW_LENGTHS: ((batch,), torch.int32),
    }
    for layer, node in enumerate(layers):
        operands: Any = node.args
        key, size = operands[1].meta["val"], _size(node)
        shape = (batch, key.shape[1], capacity, size)
        wanted |= dict.fromkeys(past_names(layer), (shape, key.dtype))
    nodes = add_inputs(graph.exported, wanted)
    graph.cache_inputs |= {name: node.name for name, node in nodes.items()}
    return nodes


def _count_on(graph: Graph, ids: fx.Node, past: fx.Node) -> fx.Node:
    """Positions (batch, length) of the new tokens, in the place of positions from 0 on."""
    first = next(node for node in graph.fx.nodes if node.op != "placeholder")
    whole = insert_call(graph.exported, first, attending.POSITIONS, ids)
    wide = insert_call(graph.exported, first, aten.to.dtype, past, torch.int64)
    counted = insert_call(graph.exported, first, aten.add.Tensor, whole, _column(graph, first, wide))
    for node in graph.find(attending.POSITIONS):
        if node is not whole:
            node.replace_all_uses_with(counted)
            graph.fx.erase_node(node)
    return counted


def _keep_within(graph: Graph, positions: fx.Node, count: int) -> None:
    """Have no position lie behind a table: those of what pads a row would, where the row is nearly full."""
    following = positions.next
    within = insert_call(graph.exported, following, aten.clamp.default, positions, None, count - 1)
    positions.replace_all_uses_with(within, delete_user_cb=lambda user: user is not within)


def _column(graph: Graph, before: fx.Node, row: fx.Node) -> fx.Node:
    return insert_call(graph.exported, before, aten.unsqueeze.default, row, 1)


def _size(node: fx.Node) -> int:
    """How large a layer's keys and values are in its cache: as large as the larger, in steps that kernels take."""
    operands: Any = node.args
    own = int(max(operand.meta["val"].shape[3] for operand in operands[:3]))
    return -(-own // _STEP) * _STEP


def _cached(
    graph: Graph, known: dict[Any, Any], node: fx.Node, kept: tuple[fx.Node, ...], distances: fx.Node | None
) -> list[fx.Node]:
    """The op with a cache in an attention's place, as ``insert_like`` calls it; returns its cache's keys and values."""
    q, k, v, _, _, sinks, scale, _, window, softcap, module = node.args
    size = _size(node)
    padded = (_padded(graph, node, operand, size) for operand in (q, k, v))
    operands = (*padded, *kept, sinks, distances, scale, window, softcap, module)
    call = functools.partial(insert_like, graph.exported, known, node)
    whole = call(attending.CACHED_ATTENTION, *operands)
    y, *presents = (call(operator.getitem, whole, place) for place in range(3))
    own = node.meta["val"].shape[3]
    if own != size:
        y = insert_call(graph.exported, node, aten.slice.Tensor, y, 3, 0, own)
    node.replace_all_uses_with(y)
    graph.fx.erase_node(node)
    return presents


def _padded(graph: Graph, before: fx.Node, value: Any, size: int) -> fx.Node:
    """Queries, keys or values with zeros behind them, which add nothing to any product."""
    own = value.meta["val"].shape[3]
    parts = [value]
    for begin in range(own, size, own):
        part = insert_call(graph.exported, before, aten.slice.Tensor, value, 3, 0, min(own, size - begin))
        parts.append(insert_call(graph.exported, before, aten.zeros_like.default, part))
    return value if len(parts) == 1 else insert_call(graph.exported, before, aten.cat.default, parts, 3)


def _pick_rows(graph: Graph) -> None:
    """What logits are wanted for differs from row to row."""
    places = next((node for node in graph.placeholders() if node.name == LOGITS_TO_KEEP), None)
    if places is None:
        return
    ids = find_token_node(graph)
    with tracing(), ids.meta["val"].fake_mode:
        places.meta["val"] = torch.empty((ids.meta["val"].shape[0], places.meta["val"].shape[0]), dtype=torch.int64)
    for node in list(places.users):
        operands: Any = node.args
        if node.target is not aten.index.Tensor or list(operands[1]) != [None, places]:
            raise Unavailable(
                "the model picks tokens for its logits in a way that cannot differ from row to row",
                next_step=WITHOUT_CACHE,
            )
        picked = insert_call(graph.exported, node, attending.ROWS, operands[0], places)
        node.replace_all_uses_with(picked)
        graph.fx.erase_node(node)
    sizes = graph.interface.sizes.with_rows(places.name, (ids.name, 0))
    graph.interface = replace(graph.interface, sizes=sizes)
    arguments, named = graph.exported.example_inputs
    rows = named[ids.name].shape[0]
    given = {**named, places.name: named[places.name].expand(rows, -1).contiguous()}
    graph.exported._example_inputs = (arguments, given)  # torch has no public call for it
