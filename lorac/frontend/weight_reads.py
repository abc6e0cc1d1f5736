"""Layers that a call reaches: as in PEFT, an adapter acts only where its layer is called.

Some modules read a layer's weight in their own forward, as swin's attention does with ``self.qkv.weight``. Such reads
are found by observing a whole call, whatever code makes them.
"""

import functools
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from lorac.errors import SiteError, list_some, warn
from lorac.frontend.copying import separate_layers
from lorac.frontend.fast_path import disable_fast_path
from lorac.frontend.host import Host
from lorac.frontend.model_runner import WatchingMode, preserve_random_state
from lorac.ir.algebra.formulas import fake_execution
from lorac.ir.graph import ops
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.nodes import find_module_path, find_stored_tensors

T = TypeVar("T")


class WeightReads(WatchingMode):
    """Observer of a call of a model: records the layers that it calls, and the layers whose weights it reads elsewhere.

    A layer that is neither called nor read, such as an expert without tokens, may be called by the next call.

    Args:
        model: a copy that belongs to the caller; its layers have another ``forward`` during the call.
        layers: paths of the layers to observe.

    Attributes:
        called: the layers that were called.
        read: the layers whose weight or bias was read outside of their forward.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        super().__init__()
        self.called, self.read = set[str](), set[str]()
        self._paths = {model.get_submodule(path): path for path in layers}
        spans = {module: list(_iterate_spans(module)) for module in model.modules()}
        observed = {span for module in self._paths for span in spans[module]}
        # Layers with tied weights also read them in their own forward, observed or not. An observed layer without
        # outputs has no span.
        self._own = {module: own for module, own in spans.items() if module in self._paths or observed & {*own}}
        self._parts: dict[int, set[tuple[int, int, _Span]]] = defaultdict(set)  # storage -> parts of it
        for span in observed:
            self._parts[span[0]].add((*span[1:], span))
        self._views: list[Tensor] = []
        self._running = Counter[_Span]()
        self._thread = threading.get_ident()

    def run(self, work: Callable[[], T]) -> T:
        """Run a function that calls the model; it must run in the thread that made the observer."""
        with ExitStack() as stack:
            for module in self._own:
                stack.enter_context(wrap_forward(module, functools.partial(self._watch, module)))
            stack.enter_context(self)
            return work()

    def _watch(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if module in self._paths:
            self.called.add(self._paths[module])
        self._running.update(self._own[module])
        try:
            return forward(*args, **kwargs)
        finally:
            self._running.subtract(self._own[module])

    def handle(self, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        found: set[_Span] = set()
        for tensor in _iterate_tensors((*args, *kwargs.values())):
            parts = self._parts.get(_find_storage(tensor))
            own = _find_span(tensor) if parts else None
            if parts and own:
                found.update(span for begin, end, span in parts if own[1] < end and begin < own[2])
        result = op(*args, **kwargs)
        if not found or not isinstance(op, OpOverload):  # torch.cond and similar ops call layers inside
            return result
        if op.is_view:  # a view reads no value, but a fake tensor's view may have another storage
            for view in _iterate_tensors([result]):
                own = _find_span(view)
                if own is not None and own[0] not in self._parts:
                    self._parts[own[0]] = {(0, sys.maxsize, span) for span in found}
                    self._views.append(view)  # keep the view alive, so that its storage's address is not reused
        else:
            unread = {span for span in found if not self._running[span]}
            self.read.update(path for module, path in self._paths.items() if not unread.isdisjoint(self._own[module]))
        return result


@contextmanager
def wrap_forward(module: nn.Module, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Make calls of a module call ``wrapper(forward, *arguments)`` inside the block; the signature does not change."""
    before, forward = vars(module).get("forward"), module.forward

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(forward, *args, **kwargs)

    module.forward = call
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


_Span = tuple[int, int, int]
"""A tensor's storage, the tensor's first byte in it, and the byte after its last."""


def _iterate_spans(module: nn.Module) -> Iterator[_Span]:
    """Yield the memory spans of a module's own parameters."""
    spans = (_find_span(parameter) for parameter in module._parameters.values() if parameter is not None)
    yield from (span for span in spans if span is not None)


def _find_span(tensor: Tensor) -> _Span | None:
    """Return the memory span of a tensor; None for a tensor without memory."""
    storage = _find_storage(tensor)
    if not storage or not tensor.numel():
        return None
    first = int(tensor.storage_offset())
    last = first + sum((int(size) - 1) * int(step) for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return storage, first * tensor.element_size(), (last + 1) * tensor.element_size()


def _find_storage(tensor: Tensor) -> int:
    """Return an id of a tensor's storage, even if it has no values; 0 if there is no storage."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a subclass without storage
        return 0


def _iterate_tensors(values: Iterable[object]) -> Iterator[Tensor]:
    """Yield the tensors among the operands of an op, including those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _iterate_tensors(value)


class LayerReads:
    """The layers whose weights a session's calls have read; an adapter has no effect at a layer that is never called.

    Args:
        adapters: function () -> mapping of adapter name to paths of the sites that it touches.

    Attributes:
        observed: names of the graphs with an observed whole call.
        read: the layers whose weights were read outside of their forward.
        only_read: layers in ``read`` that were not called.
    """

    def __init__(self, adapters: Callable[[], Mapping[str, Collection[str]]]) -> None:
        self._adapters = adapters
        self.observed, self.read, self.only_read = set[str](), set[str](), set[str]()

    def note(self, graph: str, read: Collection[str], called: Collection[str]) -> None:
        """Record an observed call of a graph.

        Args:
            graph: name of the graph.
            read, called: the layers whose weights the call read outside of their forward, and the layers that it
                called.

        Raises:
            SiteError: an adapter acts only at layers that were read and never called.
        """
        new = {*read} - {*called} - self.only_read
        self.read |= {*read}
        self.only_read |= new
        for name, paths in self._adapters().items():
            self.check(name, paths)
        self.observed.add(graph)
        if new:
            warn(
                f"adapters have no effect at {describe_only_read(new)}",
                next_step="exclude these layers (exclude=), which train in vain",
            )

    def check(self, name: str, paths: Collection[str]) -> None:
        """Refuse an adapter that acts only at layers that were read and never called.

        Args:
            name: the adapter's name.
            paths: paths of the sites that it touches.

        Raises:
            SiteError: the adapter has no effect.
        """
        if paths and self.only_read.issuperset(paths):
            raise SiteError(
                f"adapter '{name}' has no effect: it acts on {describe_only_read(paths)}",
                next_step="name other layers in targets=",
                code="site_unreached",
            )


def describe_only_read(paths: Collection[str]) -> str:
    """Format the names of layers that are only read, for a message."""
    return f"{list_some(sorted(paths), 3)}, whose weights the model only reads; PEFT has no effect there either"


def find_graph_reads(graph: Graph, model: nn.Module) -> tuple[set[str], set[str]]:
    """Return the planned layers whose weights a graph reads outside of their forward, and the layers that it calls.

    Args:
        graph: a graph at level host.
        model: the captured model, or several models.
    """
    called = {*ops.group_calls(graph.find(*ops.SITE_OPS))}
    layers = {
        path: {*_iterate_spans(model.get_submodule(path))} for path, plan in graph.plans.items() if plan.site.is_layer
    }
    read: set[str] = set()

    def is_read(node: fx.Node, path: str) -> bool:
        if not isinstance(node.target, OpOverload) or node.target.namespace == "lorac":
            return False
        if find_module_path(node) == path:
            called.add(path)  # the call is of a layer without an op
            return False
        return not node.target.is_view or any(is_read(user, path) for user in node.users)

    for node, tensor in find_stored_tensors(graph.exported).items():
        own = _find_span(tensor)
        for path in [path for path, spans in layers.items() if own in spans]:
            if any(is_read(user, path) for user in node.users):
                read.add(path)
    return read, called


def observe_example(host: Host, layers: Collection[str], inputs: object = None) -> WeightReads | None:
    """Observe a call of a model on example inputs, without computing values.

    Args:
        host: the model; a copy of it runs.
        layers: paths of the layers to observe.
        inputs: example inputs; None: they are made.

    Returns:
        The observations; None if the model cannot run without values, or on these inputs.
    """
    try:
        named = host.bind(inputs)
        copied = host.copy(share_buffers=True).model.eval()
        separate_layers(copied, layers)
        reads = WeightReads(copied, layers)
        with torch.no_grad(), preserve_random_state(host.model), disable_fast_path(copied), fake_execution():
            reads.run(lambda: copied(**named))
    except Exception:  # a model's code may raise any error, mainly where it reads a value
        return None
    return reads
