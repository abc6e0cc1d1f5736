"""Layers that repeat are traced once.

Nearly all of the time of a trace goes into layers that compute what an earlier one did, with other weights. So of a
family of layers that are alike (``lorac.frontend.capture.layer_groups``) the first that is called is traced. A later
one that is
called as it was leaves one node, in whose place the nodes of the first are copied afterwards, over its own weights.

Called as it was: with equal numbers, tensors of the same sizes for the first of its tensors and for whatever the layer
before it gave, and the very same tensors for all others, which may stand for more than their values (a mask, tables of
angles). Whatever may make the two differ unseen has both traced: a layer that reads its own number, or that is hooked.
So has a region of autocast or of gradients, within a layer or around it: torch makes a graph of its own of each.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from lorac.frontend.capture.layer_groups import IndexAttributes, LayerGroup
from lorac.frontend.layer_classes import Forward
from lorac.ir.graph import ops

_FIRSTS = "lorac.firsts"
"""Which layers that others are copied from a node belongs to, outermost first; in its metadata."""


def trace_repeated_layers_once(host: nn.Module, alike: Iterable[LayerGroup], marked: Collection[str] = ()) -> None:
    """Have a copy's layers traced once where they are alike; its sites are marked already.

    Args:
        host: a copy to trace, changed in place.
        alike: the families of layers that it has.
        marked: paths of modules that are marked by name. Layers of which not the same are marked are not alike.
    """
    states = list[_LayerState]()
    for family in alike:
        traced: dict[frozenset[str], _GroupTrace] = {}
        for path in family.paths:
            layer, marks = host.get_submodule(path), frozenset(_below(path, marked))
            tracing = traced.setdefault(marks, _GroupTrace(family.numbered))
            tracing.watch(layer, path)
            states.append(_LayerState(layer))
            _repeat(layer, path, tracing, states[-1])
    for state in states:  # now that all have been replaced, also those within others
        state.note()


def _below(path: str, paths: Collection[str]) -> Iterator[str]:
    """Paths of a module and what it is made of, as it has them."""
    for other in paths:
        if f"{other}.".startswith(f"{path}."):
            yield other.removeprefix(path)


def _repeat(layer: nn.Module, path: str, family: _GroupTrace, state: _LayerState) -> None:
    """Have a layer traced unless an earlier one of its family stands for it."""
    forward = layer.forward

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        if get_proxy_mode() is None or not state.is_as_noted or _is_within_a_region():
            return forward(*args, **kwargs)
        given = _FlatValues.of((args, kwargs))
        first = next((first for first in family.firsts if first.stands_for(given, family.answered)), None)
        if first is None:
            answer = family.trace(functools.partial(forward, *args, **kwargs), path, given, state)
        else:
            answer = first.again(given, path)
        family.answered = _FlatValues.of(answer).tensors
        return answer

    layer.forward = call


class _LayerState:
    """What a layer and the modules that it is made of hold: hooks, forwards put on them, what they keep of calls.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._noted: list[Any] = []

    def note(self) -> None:
        """Take what it is now for how it is to be."""
        self._noted = list(self._held())

    @property
    def is_as_noted(self) -> bool:
        """Whether it holds what it did, and nothing else; its tensors are others while it is traced."""
        return _same(self._noted, self._held())

    def watched(self) -> Callable[[], bool]:
        """Tells whether it still holds what it does now, tensors too."""
        before = list(self._held(tensors=True))
        return lambda: _same(before, self._held(tensors=True))

    def _held(self, *, tensors: bool = False) -> Iterator[Any]:
        states = (state for module in self._layer.modules() for state in vars(module).items())
        for name, value in states:
            if tensors or name not in _TENSORS:
                yield from value.values() if isinstance(value, dict) else (value,)


_TENSORS = ("_parameters", "_buffers")


def _same(before: Sequence[Any], now: Iterable[Any]) -> bool:
    """Whether the very same objects are held."""
    return all(one is other for one, other in itertools.zip_longest(before, now, fillvalue=_NOTHING))


_NOTHING = object()


# ── What a call is given and answers ─────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, eq=False)
class _FlatValues:
    """Values in any nesting."""

    leaves: Sequence[Any]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, tree: Any) -> _FlatValues:
        return cls(*pytree.tree_flatten(tree))

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def repeatable(self) -> bool:
        """Whether another layer may answer so: with tensors, and with no number that a trace computes."""
        return bool(self.tensors) and not any(isinstance(leaf, _NUMBERS) for leaf in self.leaves)


@dataclass(eq=False)
class _GroupTrace:
    """A family while a trace runs.

    Attributes:
        numbered: attributes that hold the layers' numbers.
        firsts: layers that were traced, and that others may repeat.
        answered: the tensors that the last call gave.
        reads: numbers that the call under way has read.
    """

    numbered: IndexAttributes
    firsts: list[_TracedLayer] = field(default_factory=list)
    answered: Sequence[Tensor] = ()
    reads: list[str] = field(default_factory=list)

    def watch(self, layer: nn.Module, path: str) -> None:
        """Notice where a layer reads its own number."""
        for inner, name in self.numbered:
            module = layer.get_submodule(inner)
            kind, number = type(module), vars(module).pop(name)
            named = {key: vars(kind)[key] for key in ("__module__", "__qualname__") if key in vars(kind)}
            own = property(self._noted(f"{path}.{name}", number))
            module.__class__ = type(kind.__name__, (kind,), {**named, name: own})

    def _noted(self, what: str, number: int) -> Callable[[nn.Module], int]:
        def read(_: nn.Module) -> int:
            self.reads.append(what)
            return number

        return read

    def trace(self, forward: Forward, path: str, given: _FlatValues, state: _LayerState) -> Any:
        """Trace a call; where nothing tells that another layer would compute otherwise, others may repeat it."""
        graph: fx.Graph = get_proxy_mode().tracer.graph  # type: ignore[union-attr]  # there is one
        called, unchanged = ops.marker(given.tensors), state.watched()
        last = next(iter(reversed(graph.nodes)))
        self.reads.clear()
        answer = forward()
        answered, nodes = _FlatValues.of(answer), list(_behind(last))
        if self.reads or not unchanged() or not answered.repeatable or any(map(_is_its_own, nodes)):
            return answer
        for node in nodes:
            known = node.meta.get("custom", {})
            node.meta["custom"] = {**known, _FIRSTS: (path, *known.get(_FIRSTS, ()))}
        made = [tensor for tensor in answered.tensors if all(tensor is not leaf for leaf in given.leaves)]
        self.firsts.append(_TracedLayer(path, given, answered, made, (called, ops.marker(made))))
        return answer


def _behind(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes of a graph behind one of it."""
    while (node := node.next).op != "root":
        yield node


def _is_its_own(node: fx.Node) -> bool:
    """Whether a node is no other layer's.

    Sizes, or the number that it is, may follow from the values of tensors, which differ by layer; or a region begins or
    ends there.
    """
    return bool(free_unbacked_symbols(node.meta.get("val"))) or node.target in (*_AUTOCAST, torch._C._set_grad_enabled)


def _is_within_a_region() -> bool:
    """Whether what is traced now lies in one of the graphs that torch makes of regions; a trace has no gradients."""
    graph: fx.Graph = get_proxy_mode().tracer.graph  # type: ignore[union-attr]  # there is one
    begun, ended = (len(graph.find_nodes(op="call_function", target=target)) for target in _AUTOCAST)
    return begun != ended or torch.is_grad_enabled()


_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
_NUMBERS = (SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, eq=False)
class _TracedLayer:
    """A layer that was traced.

    Attributes:
        path: where it is.
        given: what it was called with.
        answered: what it answered.
        made: the tensors of that which it was not called with.
        notes: of what it was called with, and of what it made.
    """

    path: str
    given: _FlatValues
    answered: _FlatValues
    made: Sequence[Tensor]
    notes: tuple[Tensor, Tensor]

    def stands_for(self, given: _FlatValues, before: Sequence[Tensor]) -> bool:
        """Whether a layer of its family computes the same ops when it is called with this.

        Args:
            given: what it is called with.
            before: what the layer before it gave.
        """
        if given.spec != self.given.spec:
            return False
        stream = {id(tensor) for tensor in (*given.tensors[:1], *before)}
        pairs = zip(given.leaves, self.given.leaves, strict=True)
        return all(one is other or _alike(one, other, flows=id(one) in stream) for one, other in pairs)

    def again(self, given: _FlatValues, path: str) -> Any:
        """What the layer at a path answers: as this one did, by one node that is called in its place."""
        passed = {id(old): new for old, new in zip(self.given.leaves, given.leaves, strict=True)}
        found = ops.repeated_layer(given.tensors, self.made, self.notes, path, self.path)
        answer = passed | {id(old): new for old, new in zip(self.made, found, strict=True)}
        leaves = [answer[id(leaf)] if isinstance(leaf, Tensor) else leaf for leaf in self.answered.leaves]
        return pytree.tree_unflatten(leaves, self.answered.spec)


def _alike(one: Any, other: Any, *, flows: bool) -> bool:
    """Whether a layer computes the same ops with one value as with another."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        told = [(t.dtype, t.device, *map(str, (*t.shape, *t.stride())), len(t.shape)) for t in (one, other)]
        return flows and told[0] == told[1]
    if isinstance(one, SymInt) and isinstance(other, SymInt):
        return str(one) == str(other)
    return type(one) is type(other) and isinstance(one, int | float | str | torch.dtype | torch.device) and one == other


# ── Afterwards ───────────────────────────────────────────────────────────────────────────────────────────────────────
def expand_repeated_layers(program: ExportedProgram, prefix: str = "") -> None:
    """Put the nodes of the layer that was traced into the place of each that repeats it; edited in place.

    Args:
        program: as it was traced.
        prefix: what the paths of its sites begin with.
    """
    _complete_users(program.graph)
    inputs = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    held = [spec for spec in program.graph_signature.input_specs if spec.kind in _HELD]
    weights = {str(spec.target): inputs[spec.arg.name] for spec in held}
    repeated = [node for node in program.graph.nodes if node.target is ops.REPEATED_LAYER]
    traced = dict[str, list[fx.Node]]()
    for node in repeated:
        first = str(node.args[-1])
        if first not in traced:  # by now all within it is copied
            traced[first] = [other for other in program.graph.nodes if _is_of(first, other)]
        _LayerCopier(program.graph, weights, node, prefix).run(traced[first])
    for node in list(program.graph.nodes):
        node.meta.get("custom", {}).pop(_FIRSTS, None)
        if node.target is ops.MARKER:
            program.graph.erase_node(node)
    if repeated:
        program.graph.lint()


def _complete_users(graph: fx.Graph) -> None:
    """Have every node know who reads it: where torch puts a region's nodes in its place again, some do not."""
    for node in graph.nodes:
        for read in node.all_input_nodes:
            read.users.setdefault(node)


_HELD = (InputKind.PARAMETER, InputKind.BUFFER)
"""Inputs that each layer has its own of; constants of a trace are the same in all."""


class _LayerCopier:
    """The nodes of one layer, copied into the place of a node that stands for another.

    Args:
        graph: that of both.
        weights: name of a tensor of the model's -> its input.
        node: the node that stands for a layer.
        prefix: what the paths of sites begin with.
    """

    def __init__(self, graph: fx.Graph, weights: Mapping[str, fx.Node], node: fx.Node, prefix: str) -> None:
        operands: Any = node.args
        given, _, notes, self.path, self.first = operands
        first_given, answered = (note.args[0] for note in notes)
        self.answered: Sequence[fx.Node] = answered
        self.graph, self.node, self.prefix = graph, node, prefix
        self.mapped: dict[fx.Node, fx.Node] = dict(zip(first_given, given, strict=True))
        below = f"{self.first}."
        for name, place in weights.items():
            if name.startswith(below):
                self.mapped[place] = weights[f"{self.path}.{name.removeprefix(below)}"]

    def run(self, traced: Sequence[fx.Node]) -> None:
        """Copy the nodes of the layer that was traced, and have what reads this one's outputs read the copies'."""
        outer = self.node.meta.get("custom", {}).get(_FIRSTS, ())
        with self.graph.inserting_before(self.node):
            for node in traced:
                self.mapped[node] = self._copied(node, outer)
        for user in list(self.node.users):
            answered = self.answered[int(user.args[1])]  # type: ignore[arg-type]  # a list is taken apart by number
            user.replace_all_uses_with(self.mapped.get(answered, answered))
            self.graph.erase_node(user)
        self.graph.erase_node(self.node)

    def _copied(self, node: fx.Node, outer: tuple[str, ...]) -> fx.Node:
        """A node with the other layer's tensors and paths; it belongs to what that belongs to, and what is within."""
        copied = self.graph.node_copy(node, lambda read: self.mapped.get(read, read))
        renamed: Any = map_aggregate((copied.args, copied.kwargs), self._renamed)
        copied.args, copied.kwargs = renamed
        stack = node.meta.get("nn_module_stack")
        if stack:
            copied.meta["nn_module_stack"] = {
                self._renamed_in(key): (self._renamed(path), *rest) for key, (path, *rest) in stack.items()
            }
        inner = node.meta["custom"][_FIRSTS]
        inner = inner[inner.index(self.first) + 1 :]
        copied.meta["custom"] = {**node.meta["custom"], _FIRSTS: (*outer, *map(self._renamed, inner))}
        return copied

    def _renamed(self, value: Any) -> Any:
        """A path in the layer that was traced, as it is in the other; everything else as it is."""
        for prefix in dict.fromkeys((self.prefix, "")):
            mine, theirs = f"{prefix}{self.first}", f"{prefix}{self.path}"
            if isinstance(value, str) and f"{value}.".startswith(f"{mine}."):
                return theirs + value[len(mine) :]
        return value

    def _renamed_in(self, key: str) -> str:
        """The key of a module's path in a stack, which torch makes of the path."""
        return key.replace(f"__{self.first}", f"__{self.path}", 1)


def _is_of(first: str, node: fx.Node) -> bool:
    """Whether a node is to be copied with a layer. Constants, and numbers, which are of sizes, are the same in all."""
    shared = node.op == "placeholder" or isinstance(node.meta.get("val"), int | float | bool | SymInt | torch.SymFloat)
    return first in node.meta.get("custom", {}).get(_FIRSTS, ()) and not shared
