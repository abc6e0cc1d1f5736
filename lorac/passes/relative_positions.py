"""Biases of attention that depend on how far a key is from the query: by distance, for as many as a cache holds.

A model computes such a bias of the numbers of queries and keys, for a whole text. What a part of a text needs of it is
what the first key adds to queries 0, 1, 2, ... : so the same is computed for that one key and all places of the cache.
That it depends on the distance alone is not looked for: whoever holds parts against the whole finds out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from lorac.errors import Unavailable
from lorac.frontend.capture.position_ids import is_token_numbering
from lorac.ir.graph.attention_ops import WITHOUT_CACHE
from lorac.ir.graph.edit import copy_provenance, insert_call
from lorac.ir.graph.graph import Graph

aten = torch.ops.aten
_BIAS, _SIDES = 3, 2
"""Which operand of an attention its bias is; a bias has queries and keys."""


@dataclass(eq=False)
class RelativePositions:
    """The biases of a graph's attentions by distance, each once.

    Args:
        graph: edited in place.
        length: what torch calls the text's length.
        cache: keys of a layer, (batch, heads, capacity, size).
    """

    graph: Graph
    length: str
    cache: fx.Node
    _made: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def of(self, attention: fx.Node) -> fx.Node | None:
        """What an attention adds to the score of a key so many tokens before: (heads, capacity); None for nothing.

        Raises:
            Unavailable: it is made of something else than the numbers of queries and keys.
        """
        bias: Any = attention.args[_BIAS]
        if bias is None:
            return None
        if bias not in self._made:
            self._made[bias] = self._computed(attention, bias)
        return self._made[bias]

    def _computed(self, attention: fx.Node, bias: fx.Node) -> fx.Node:
        parts = self._parts(bias)
        numbers = [node for node in parts if is_token_numbering(node, self.length)]
        if len(numbers) != _SIDES or bias.meta["val"].shape[0] != 1:
            raise _unfit(attention)
        program = self.graph.exported
        capacity = insert_call(program, attention, aten.sym_size.int, self.cache, 2)
        every, one = (insert_call(program, attention, aten.arange.default, count) for count in (capacity, 1))
        for queries, keys in (numbers, reversed(numbers)):
            made = self._again(attention, parts, {queries: every, keys: one})
            wide, narrow = made.meta["val"].shape[2:]
            if narrow == 1 and str(wide) == str(capacity.meta["val"]):
                row = insert_call(program, attention, aten.select.int, made, 3, 0)
                return insert_call(program, attention, aten.select.int, row, 0, 0)
        raise _unfit(attention)

    def _parts(self, bias: fx.Node) -> list[fx.Node]:
        """What depends on the text's length, of what a bias is made of, in order."""
        found, waiting = {bias}, [bias]
        while waiting:
            new = [node for node in waiting.pop().all_input_nodes if node not in found]
            found.update(new)
            waiting += new
        varies: dict[fx.Node, None] = {}
        for node in self.graph.fx.nodes:
            if node in found and (
                is_token_numbering(node, self.length) or not varies.keys().isdisjoint(node.all_input_nodes)
            ):
                varies[node] = None
        return list(varies)

    def _again(self, attention: fx.Node, parts: list[fx.Node], known: dict[fx.Node, fx.Node]) -> fx.Node:
        """The same computed of other numbers."""
        for node in (node for node in parts if node not in known):
            arguments = fx.map_arg((node.args, node.kwargs), lambda operand: known.get(operand, operand))
            try:
                made = insert_call(self.graph.exported, attention, node.target, *arguments[0], **arguments[1])
            except Exception as error:  # whatever an op makes of sizes that it was not traced with
                raise _unfit(attention) from error
            copy_provenance(made, node)
            known[node] = made
        return known[parts[-1]]


def _unfit(attention: fx.Node) -> Unavailable:
    return Unavailable(
        f"'{attention.args[-1]}' adds a bias to its scores that is no matter of distances", next_step=WITHOUT_CACHE
    )
