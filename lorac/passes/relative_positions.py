"""Biases of attention by the distance from query to key, for as many keys as a cache holds.

A model computes such a bias for a whole sequence, from the numbers of queries and keys. A part of a sequence needs the
bias of the first key for queries 0, 1, 2, …: the pass repeats the computation for that one key and all places of the
cache. It does not check that the bias depends on distances alone; the comparison of parts with the whole sequence does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import fx

from lorac.errors import Unavailable
from lorac.frontend.capture.decoder_families import is_token_numbering
from lorac.ir.graph.attention_ops import WITHOUT_CACHE
from lorac.ir.graph.edit import insert_call
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.nodes import copy_provenance, get_example

aten = torch.ops.aten
_BIAS_OPERAND = 3
"""Which operand of an attention is its bias."""


@dataclass(eq=False)
class RelativePositions:
    """The biases of a graph's attentions by distance, each computed once.

    Args:
        graph: edited in place.
        length: torch's symbol for the sequence's length.
        cache: keys of a layer, (batch, heads, capacity, size).
    """

    graph: Graph
    length: str
    cache: fx.Node
    _found: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def find_bias(self, attention: fx.Node) -> fx.Node | None:
        """Return the bias for a key so many tokens before the query: (heads, capacity); None without a bias.

        Raises:
            Unavailable: the bias depends on more than the numbers of queries and keys.
        """
        bias = attention.args[_BIAS_OPERAND]
        if not isinstance(bias, fx.Node):
            return None
        if bias not in self._found:
            self._found[bias] = self._compute(attention, bias)
        return self._found[bias]

    def _compute(self, attention: fx.Node, bias: fx.Node) -> fx.Node:
        parts = self._find_parts(bias)
        numberings = [node for node in parts if is_token_numbering(node, self.length)]
        if len(numberings) != 2 or get_example(bias).shape[0] != 1:  # one of queries, one of keys
            raise _unsupported_bias(attention)
        program = self.graph.exported
        capacity = insert_call(program, attention, aten.sym_size.int, self.cache, 2)
        every, one = (insert_call(program, attention, aten.arange.default, count) for count in (capacity, 1))
        for queries, keys in (numberings, reversed(numberings)):
            repeated = self._repeat(attention, parts, {queries: every, keys: one})
            wide, narrow = get_example(repeated).shape[2:]
            if narrow == 1 and str(wide) == str(capacity.meta["val"]):
                row = insert_call(program, attention, aten.select.int, repeated, 3, 0)
                return insert_call(program, attention, aten.select.int, row, 0, 0)
        raise _unsupported_bias(attention)

    def _find_parts(self, bias: fx.Node) -> list[fx.Node]:
        """Return the nodes from which a bias is computed and that depend on the sequence's length, in order."""
        found, pending = {bias}, [bias]
        while pending:
            new = [node for node in pending.pop().all_input_nodes if node not in found]
            found.update(new)
            pending += new
        parts: dict[fx.Node, None] = {}
        for node in self.graph.fx.nodes:
            numbers = node in found and is_token_numbering(node, self.length)
            if numbers or (node in found and not parts.keys().isdisjoint(node.all_input_nodes)):
                parts[node] = None
        return list(parts)

    def _repeat(self, attention: fx.Node, parts: list[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
        for node in (node for node in parts if node not in copies):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: copies.get(operand, operand))
            try:
                copy = insert_call(self.graph.exported, attention, node.target, *args, **kwargs)
            except Exception as error:  # an op may raise anything for sizes that it was not traced with
                raise _unsupported_bias(attention) from error
            copy_provenance(copy, node)
            copies[node] = copy
        return copies[parts[-1]]


def _unsupported_bias(attention: fx.Node) -> Unavailable:
    return Unavailable(
        f"'{attention.args[-1]}' adds a bias to its scores that depends on more than distances", next_step=WITHOUT_CACHE
    )
