"""Attention biases by the distance from query to key, for as many keys as a cache has.

A model computes such a bias for a whole sequence, from the numbers of queries and keys. For a part of a sequence, the
bias of the first key for queries 0, 1, 2, … is needed: the pass repeats the computation for that key and all positions
in the cache. It does not check that the bias depends only on distances; the comparison of parts with the whole sequence
does.

Where the bias of a key is its index times a slope (ALiBi), the softmax depends only on differences, which are a table.
"""

from dataclasses import dataclass, field

import torch
from torch import fx

from lorac.errors import Unavailable
from lorac.frontend.capture.decoder_families import DEFAULT_POSITIONS, is_token_numbering
from lorac.ir.graph.attention_ops import BIAS_OPERAND, WITHOUT_CACHE
from lorac.ir.graph.edit import add_constant, insert_call
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.interpreter import evaluate
from lorac.ir.graph.nodes import copy_provenance, find_sources, find_stored_tensors, get_example

aten = torch.ops.aten
_ROUNDING = 0.01
"""Largest deviation of slopes in half precision from a line, relative to their largest value."""


@dataclass(eq=False)
class RelativePositions:
    """The attention biases of a graph by distance, each computed once.

    Args:
        graph: edited in place.
        ids: the input with the sequence's tokens, (batch, length).
        cache: the cached keys of a layer, (batch, heads, capacity, size).

    Attributes:
        longest: the longest sequence that tables admit; None without tables.
    """

    graph: Graph
    ids: fx.Node
    cache: fx.Node
    longest: int | None = None
    _found: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def length(self) -> str:
        """torch's symbol for the sequence's length."""
        return str(get_example(self.ids).shape[1])

    def find_bias(self, attention: fx.Node) -> fx.Node | None:
        """Return the bias by the number of tokens between key and query: (heads, capacity); None without a bias.

        Raises:
            Unavailable: the bias depends on more than the numbers of queries and keys.
        """
        bias = attention.args[BIAS_OPERAND]
        if not isinstance(bias, fx.Node):
            return None
        if bias not in self._found:
            self._found[bias] = self._compute(attention, bias)
        return self._found[bias]

    def _compute(self, attention: fx.Node, bias: fx.Node) -> fx.Node:
        found, dependent = find_sources([bias]), dict[fx.Node, None]()  # the sources that depend on the sequence length
        for node in self.graph.fx.nodes:
            read = node in found and not dependent.keys().isdisjoint(node.all_input_nodes)
            if read or (node in found and is_token_numbering(node, self.length)):
                dependent[node] = None
        parts = list(dependent)
        numberings = [node for node in parts if is_token_numbering(node, self.length)]
        if len(numberings) != 2 or get_example(bias).shape[0] != 1:  # one numbering of queries, one of keys
            rows, length = get_example(self.ids).shape
            count = self.graph.longest or DEFAULT_POSITIONS
            known = {**find_stored_tensors(self.graph.exported), self.ids: torch.zeros(1, count, dtype=torch.int64)}
            try:
                ((keys,),) = evaluate(bias, known, {str(rows): 1, str(length): count}).transpose(1, 2)
            except Exception as error:  # an op may raise any error for sizes with which it was not traced
                raise _unsupported_bias(attention) from error
            first, last, self.longest = keys[:, :1], keys[:, -1:], keys.shape[1]
            line = torch.lerp(first.float(), last.float(), torch.linspace(0, 1, keys.shape[1]))
            if keys.shape[1] < 2 or not (keys - line).abs().max() <= _ROUNDING * keys.abs().max():
                raise _unsupported_bias(attention)
            # The end of the sequence with the smaller values has the smaller rounding error.
            behind = first - keys if first.abs().max() <= last.abs().max() else keys.flip(1) - last
            return add_constant(self.graph.exported, behind.to(get_example(attention.args[1]).dtype))
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

    def _repeat(self, attention: fx.Node, parts: list[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
        for node in (node for node in parts if node not in copies):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: copies.get(operand, operand))
            try:
                copy = insert_call(self.graph.exported, attention, node.target, *args, **kwargs)
            except Exception as error:  # an op may raise any error for sizes with which it was not traced
                raise _unsupported_bias(attention) from error
            copy_provenance(copy, node)
            copies[node] = copy
        return copies[parts[-1]]


def _unsupported_bias(attention: fx.Node) -> Unavailable:
    return Unavailable(
        f"'{attention.args[-1]}' adds a bias to its scores that depends on more than distances", next_step=WITHOUT_CACHE
    )
