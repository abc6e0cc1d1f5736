"""layers: of equal layers, only one is traced.

Most of a trace's time goes into layers that repeat the computation of an earlier layer with other weights. So in a
group of equal layers (``lorac.frontend.capture.layer_groups``) the first called layer is traced. A later layer with a
matching call becomes one node, which a pass replaces by copies of the first layer's nodes over the later layer's
weights.

A call matches if its numbers are equal; if its first tensor and the outputs of the previous layer have the same sizes;
and if all other tensors are identical objects, which may mean more than their values (a mask, tables of angles). A
layer is traced itself if it might differ unnoticed: if it reads its index, or has hooks. So is a layer inside or around
a region of autocast or of gradients, since torch makes a separate graph of each region.
"""

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import SymInt, Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from lorac.argument_types import Operands
from lorac.frontend.capture.layer_groups import IndexAttributes, LayerGroup
from lorac.frontend.layer_classes import Forward
from lorac.ir.graph import ops
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.passes import PassResult, TracePass

_FIRSTS = "lorac.firsts"
"""Key of a node's metadata: the traced layers to which the node belongs, outermost first."""


def trace_repeated_layers_once(host: nn.Module, groups: Iterable[LayerGroup], marked: Collection[str] = ()) -> None:
    """Make a copy trace each group of equal layers once; sites must call their ops already.

    Args:
        host: a copy to trace, changed in place.
        groups: the copy's groups of equal layers.
        marked: paths of modules whose outputs are ops; layers that differ in them are not equal.
    """
    states = list[_LayerState]()
    for group in groups:
        traced: dict[frozenset[str], _GroupTrace] = {}
        for path in group.paths:
            layer = host.get_submodule(path)
            inside = frozenset(other.removeprefix(path) for other in marked if f"{other}.".startswith(f"{path}."))
            tracing = traced.setdefault(inside, _GroupTrace(group.numbered))
            tracing.watch_index(layer, path)
            states.append(_LayerState(layer))
            _repeat(layer, path, tracing, states[-1])
    for state in states:  # after all layers are replaced, nested layers too
        state.record()


def _repeat(layer: nn.Module, path: str, group: "_GroupTrace", state: "_LayerState") -> None:
    """Make a layer be traced unless an earlier layer of its group can replace the trace."""
    forward = layer.forward

    @functools.wraps(forward)
    def call(*args: object, **kwargs: object) -> object:
        mode = get_proxy_mode()
        if mode is None or not state.is_unchanged or torch.is_grad_enabled():  # a trace has no gradients
            return forward(*args, **kwargs)
        graph: fx.Graph = mode.tracer.graph
        begun, ended = (len(graph.find_nodes(op="call_function", target=target)) for target in _AUTOCAST)
        if begun != ended:  # the region becomes a separate graph
            return forward(*args, **kwargs)
        arguments = _FlatValues.of((args, kwargs))
        first = next((first for first in group.traced_layers if first.stands_for(arguments, group.outputs)), None)
        if first is None:
            result = group.trace(functools.partial(forward, *args, **kwargs), path, arguments, state)
        else:
            result = first.repeat(arguments, path)
        group.outputs = _FlatValues.of(result).tensors
        return result

    layer.forward = call


class _LayerState:
    """The attributes of a layer and its modules: hooks, replaced forwards, values kept between calls."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._recorded: list[object] = []

    def record(self) -> None:
        """Record the present state as the expected one."""
        self._recorded = list(self._iter_state())

    @property
    def is_unchanged(self) -> bool:
        """Whether the state equals the recorded one; tensors are left out, since they differ during a trace."""
        return _same(self._recorded, self._iter_state())

    def watch_changes(self) -> Callable[[], bool]:
        """Return a function that returns whether the state, tensors included, has not changed since."""
        before = list(self._iter_state(tensors=True))
        return lambda: _same(before, self._iter_state(tensors=True))

    def _iter_state(self, *, tensors: bool = False) -> Iterator[object]:
        states = (state for module in self._layer.modules() for state in vars(module).items())
        for name, value in states:
            if tensors or name not in _TENSORS:
                yield from value.values() if isinstance(value, dict) else (value,)


_TENSORS = ("_parameters", "_buffers")


def _same(before: Sequence[object], now: Iterable[object]) -> bool:
    """Return whether both sequences contain identical objects."""
    return all(one is other for one, other in itertools.zip_longest(before, now, fillvalue=_NOTHING))


_NOTHING = object()


@dataclass(frozen=True, eq=False)
class _FlatValues:
    """Nested values, flattened."""

    leaves: Sequence[object]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, tree: object) -> "_FlatValues":
        return cls(*pytree.tree_flatten(tree))

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def is_repeatable(self) -> bool:
        """Whether another layer may return equivalent values: tensors, and no number that a trace computes."""
        return bool(self.tensors) and not any(isinstance(leaf, _NUMBERS) for leaf in self.leaves)


@dataclass(eq=False)
class _GroupTrace:
    """A group of equal layers during a trace.

    Attributes:
        numbered: attributes that store the layers' indices.
        traced_layers: traced layers, which other layers may repeat.
        outputs: the tensors that the last call returned.
        reads: indices that the current call has read.
    """

    numbered: IndexAttributes
    traced_layers: "list[_TracedLayer]" = field(default_factory=list)
    outputs: Sequence[Tensor] = ()
    reads: list[str] = field(default_factory=list)

    def watch_index(self, layer: nn.Module, path: str) -> None:
        """Record reads of a layer's own index."""

        def read(_: nn.Module, name: str, number: int) -> int:
            self.reads.append(name)
            return number

        for inner, name in self.numbered:
            module = layer.get_submodule(inner)
            kind, number = type(module), vars(module).pop(name)
            named = {key: vars(kind)[key] for key in ("__module__", "__qualname__") if key in vars(kind)}
            layer_index = property(functools.partial(read, name=f"{path}.{name}", number=number))
            module.__class__ = type(kind.__name__, (kind,), {**named, name: layer_index})

    def trace(self, forward: Forward, path: str, arguments: _FlatValues, state: _LayerState) -> object:
        """Trace a call; other layers may repeat it unless there is evidence that they might compute differently."""
        graph: fx.Graph = get_proxy_mode().tracer.graph  # type: ignore[union-attr]  # there is one
        argument_marker, unchanged = ops.marker(arguments.tensors), state.watch_changes()
        last = next(iter(reversed(graph.nodes)))
        self.reads.clear()
        result = forward()
        outputs, nodes = _FlatValues.of(result), list(_nodes_after(last))
        # Sizes, or a node's constant value, may depend on values of tensors, which differ by layer. A region of
        # autocast or of gradients is a separate graph.
        unrepeatable = {*_AUTOCAST, torch._C._set_grad_enabled}
        bound = any(free_unbacked_symbols(node.meta.get("val")) or node.target in unrepeatable for node in nodes)
        if self.reads or not unchanged() or not outputs.is_repeatable or bound:
            return result
        for node in nodes:
            known = node.meta.get("custom", {})
            node.meta["custom"] = {**known, _FIRSTS: (path, *known.get(_FIRSTS, ()))}
        results = [tensor for tensor in outputs.tensors if all(tensor is not leaf for leaf in arguments.leaves)]
        self.traced_layers.append(
            _TracedLayer(path, arguments, outputs, results, (argument_marker, ops.marker(results)))
        )
        return result


def _nodes_after(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes of a graph after a node."""
    while (node := node.next).op != "root":
        yield node


_AUTOCAST = (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast)
_NUMBERS = (SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True, eq=False)
class _TracedLayer:
    """A layer that was traced.

    Attributes:
        results: tensors among the layer's outputs that are not among its arguments.
        markers: nodes that mark the layer's arguments and results.
    """

    path: str
    arguments: _FlatValues
    outputs: _FlatValues
    results: Sequence[Tensor]
    markers: tuple[Tensor, Tensor]

    def stands_for(self, arguments: _FlatValues, before: Sequence[Tensor]) -> bool:
        """Return whether another layer of the group, with these arguments, computes the same ops.

        Args:
            before: the outputs of the previous layer.
        """
        if arguments.spec != self.arguments.spec:
            return False
        stream = {id(tensor) for tensor in (*arguments.tensors[:1], *before)}
        pairs = zip(arguments.leaves, self.arguments.leaves, strict=True)
        return all(one is other or _alike(one, other, flows=id(one) in stream) for one, other in pairs)

    def repeat(self, arguments: _FlatValues, path: str) -> object:
        """Return the outputs of the layer at ``path``, from a node that stands for it and repeats this layer."""
        passed = {id(old): new for old, new in zip(self.arguments.leaves, arguments.leaves, strict=True)}
        found = ops.repeated_layer(arguments.tensors, self.results, self.markers, path, self.path)
        result = passed | {id(old): new for old, new in zip(self.results, found, strict=True)}
        leaves = [result[id(leaf)] if isinstance(leaf, Tensor) else leaf for leaf in self.outputs.leaves]
        return pytree.tree_unflatten(leaves, self.outputs.spec)


def _alike(one: object, other: object, *, flows: bool) -> bool:
    """Return whether a layer computes the same ops with either value."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        properties = [(t.dtype, t.device, *map(str, (*t.shape, *t.stride())), len(t.shape)) for t in (one, other)]
        return flows and properties[0] == properties[1]
    if isinstance(one, SymInt) and isinstance(other, SymInt):
        return str(one) == str(other)
    return type(one) is type(other) and isinstance(one, int | float | str | torch.dtype | torch.device) and one == other


@final
@dataclass(frozen=True)
class ExpandRepeatedLayers(TracePass):
    """Replace each node that stands for a layer by copies of the traced layer's nodes.

    Attributes:
        prefix: prefix of the paths of the graph's sites.
    """

    name: ClassVar[str] = "layers"
    prefix: str = ""

    def apply(self, graph: Graph) -> PassResult:
        for node in graph.fx.nodes:  # torch leaves out users where it inlines a region
            for read in node.all_input_nodes:
                read.users.setdefault(node)
        inputs = {node.name: node for node in graph.placeholders()}
        specs = [spec for spec in graph.exported.graph_signature.input_specs if spec.kind in _LAYER_INPUTS]
        weights = {str(spec.target): inputs[spec.arg.name] for spec in specs}
        repeated = list(graph.find(ops.REPEATED_LAYER))
        traced = dict[fx.Node, list[fx.Node]]()
        for node in repeated:
            copier = _LayerCopier(graph.fx, weights, node, self.prefix)
            if copier.begin not in traced:  # by now its inner layers are copied
                traced[copier.begin] = copier.list_traced()
            copier.run(traced[copier.begin])
        for node in graph.fx.nodes:
            node.meta.get("custom", {}).pop(_FIRSTS, None)
        markers = list(graph.find(ops.MARKER))  # the markers of inner layers include copies
        for node in markers:
            graph.fx.erase_node(node)
        if repeated:
            graph.fx.lint()
        return PassResult(bool(repeated or markers))


_LAYER_INPUTS = (InputKind.PARAMETER, InputKind.BUFFER)
"""Inputs of which each layer has its own; all layers share the constants of a trace."""


class _LayerCopier:
    """A copier of one layer's nodes to the place of a node that stands for another layer.

    Args:
        graph: the graph of both layers.
        weights: name of a tensor of the model -> its input.
        node: the node that stands for the other layer.
        prefix: prefix of the paths of sites.
    """

    def __init__(self, graph: fx.Graph, weights: Mapping[str, fx.Node], node: fx.Node, prefix: str) -> None:
        operands: Operands = node.args
        arguments, _, (self.begin, self.end), self.path, self.first = operands
        first_given, outputs = self.begin.args[0], self.end.args[0]
        self.outputs: Sequence[fx.Node] = outputs
        self.graph, self.node, self.prefix = graph, node, prefix
        self.mapped: dict[fx.Node, fx.Node] = dict(zip(first_given, arguments, strict=True))
        below = f"{self.first}."
        for name, place in weights.items():
            if name.startswith(below):
                self.mapped[place] = weights[f"{self.path}.{name.removeprefix(below)}"]

    def list_traced(self) -> list[fx.Node]:
        """Return the nodes of the traced layer in the call that this node repeats."""
        call = itertools.takewhile(lambda node: node is not self.end, _nodes_after(self.begin))
        nodes = [node for node in call if self.first in node.meta.get("custom", {}).get(_FIRSTS, ())]
        # All layers share constants and numbers, which are sizes.
        numbers = int | float | bool | SymInt | torch.SymFloat
        return [n for n in nodes if n.op != "placeholder" and not isinstance(n.meta.get("val"), numbers)]

    def run(self, traced: Sequence[fx.Node]) -> None:
        """Copy the nodes of the traced layer, and make the readers of this layer's outputs read the copies."""
        outer = self.node.meta.get("custom", {}).get(_FIRSTS, ())
        with self.graph.inserting_before(self.node):
            for node in traced:
                self.mapped[node] = self._copied(node, outer)
        for user in list(self.node.users):
            outputs = self.outputs[int(user.args[1])]  # type: ignore[arg-type]  # getitem of a list by number
            user.replace_all_uses_with(self.mapped.get(outputs, outputs))
            self.graph.erase_node(user)
        self.graph.erase_node(self.node)

    def _copied(self, node: fx.Node, outer: tuple[str, ...]) -> fx.Node:
        copied = self.graph.node_copy(node, lambda read: self.mapped.get(read, read))
        renamed: Any = map_aggregate((copied.args, copied.kwargs), self._renamed)
        copied.args, copied.kwargs = renamed
        stack = node.meta.get("nn_module_stack")
        if stack:
            copied.meta["nn_module_stack"] = {
                # torch derives the key of a module from its path
                key.replace(f"__{self.first}", f"__{self.path}", 1): (self._renamed(path), *rest)
                for key, (path, *rest) in stack.items()
            }
        inner = node.meta["custom"][_FIRSTS]
        inner = inner[inner.index(self.first) + 1 :]
        copied.meta["custom"] = {**node.meta["custom"], _FIRSTS: (*outer, *map(self._renamed, inner))}
        return copied

    def _renamed(self, value: Any) -> Any:
        """Convert a path in the traced layer to the path in the other layer; return other values unchanged."""
        for prefix in dict.fromkeys((self.prefix, "")):
            path, other_path = f"{prefix}{self.first}", f"{prefix}{self.path}"
            if isinstance(value, str) and f"{value}.".startswith(f"{path}."):
                return other_path + value[len(path) :]
        return value
