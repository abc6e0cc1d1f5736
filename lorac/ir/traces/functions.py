"""Traces of functions, equal to ``torch.fx.experimental.proxy_tensor.make_fx``'s, in a fraction of the time.

``make_fx`` wraps methods of ``torch.nn.Module`` during a trace, though its wrappers only return the methods' results.
After each change of that class Python visits all its subclasses, which takes 15 ms where diffusers and timm are
imported, even for a function of three steps. torch has no public way to skip the wrapping, so its private classes are
used here, and a test compares the graphs with ``make_fx``'s. A trace also needs the arguments that ops write into.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, _MakefxTracer

from lorac.ir.traces.modes import FunctionMode

if TYPE_CHECKING:
    from torch.fx.experimental.proxy_tensor import _GraphAppendingTracerEx

Decompositions = Mapping[Any, Callable[..., Any]]
"""Op -> a function that computes the op by other ops."""


class _FunctionTracer(_MakefxTracer):
    """A trace of a function that wraps no method of ``torch.nn.Module``."""

    def _construct_modes_with_fx_tracer(self, fx_tracer: PythonKeyTracer | _GraphAppendingTracerEx) -> None:
        assert isinstance(fx_tracer, PythonKeyTracer)
        # An instance attribute: torch traces the branches of torch.cond only with a PythonKeyTracer itself, not a
        # subclass.
        vars(fx_tracer)["trace"] = functools.partial(_record, fx_tracer)
        super()._construct_modes_with_fx_tracer(fx_tracer)


def record_function(
    function: Callable[..., object],
    *values: object,
    decompositions: Decompositions | None = None,
    pre_dispatch: bool = False,
) -> fx.GraphModule:
    """Record the ops that a function of tensors calls on these values.

    Args:
        function: a function of positional arguments.
        *values: its arguments, as a rule fake tensors.
        decompositions: ops that are recorded as other ops.
        pre_dispatch: record ops as they are called, before autograd and before torch decomposes them.
    """

    @functools.wraps(function)
    def keep_detach(*values: object) -> object:
        with _DetachMode():
            return function(*values)

    traced = _FunctionTracer(
        decompositions,
        tracing_mode="real",
        _allow_non_fake_inputs=False,
        pre_dispatch=pre_dispatch,
        record_module_stack=False,
        _allow_fake_constant=False,
        _error_on_data_dependent_ops=True,
    ).trace(function if pre_dispatch else keep_detach, *values)
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.lorac.detach.default):
        node.target = torch.ops.aten.detach.default
    traced.recompile()
    return traced


@torch.library.custom_op("lorac::detach", mutates_args=())
def _detach(x: Tensor) -> Tensor:
    return x.clone()


@_detach.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _DetachMode(FunctionMode):
    """A mode that records detach as an op; torch 2.15 records an alias instead, through which gradients flow."""

    def handle(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        return _detach(*args) if function in (Tensor.detach, torch.detach) else function(*args, **kwargs)


def _record(tracer: PythonKeyTracer, function: Callable[..., Any], arguments: Any) -> fx.Graph:
    """Replace ``fx.Tracer.trace``: call the function with proxies of its arguments."""
    del vars(tracer)["trace"]  # a reference to itself would keep the tracer alive until the next garbage collection
    tracer.root, tracer.graph, tracer.tensor_attrs = torch.nn.Module(), fx.Graph(tracer_cls=type(tracer)), {}
    function, proxies = tracer.create_args_for_root(function, False, arguments)
    tracer.create_node("output", "output", (tracer.create_arg(function(*proxies)),), {})
    return tracer.graph


@functools.lru_cache(maxsize=4096)
def find_aliased_arguments(op: object, writes: bool) -> tuple[tuple[int, str], ...]:
    """Return positions and names of arguments that an op writes into, or without ``writes`` returns views of."""
    schema = getattr(op, "_schema", None)  # higher-order ops and Python functions have no schema
    arguments = enumerate(schema.arguments if schema is not None else ())
    return tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write is writes)


def find_written_tensors(op: object, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """Return the tensors into which a call of an op writes."""
    places = find_aliased_arguments(op, writes=True)
    if not places:
        return []
    values = [kwargs[name] if name in kwargs else args[i] for i, name in places if name in kwargs or i < len(args)]
    flat = [part for value in values for part in (value if isinstance(value, list | tuple) else (value,))]
    return [value for value in flat if isinstance(value, Tensor)]
