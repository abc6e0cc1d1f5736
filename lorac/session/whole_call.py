"""Calls of a compiled model inside torch.compile, as one graph.

Dynamo cannot trace lorac's own code: its locks, caches and the state of a call. torch traces such a function as it runs
instead (``torch._dynamo.nonstrict_trace``), and keeps the graph for other calls while the arguments that are no tensors
stay equal. So these name all that it depends on: the model, its adapters, the choice, which modules train.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
from torch._guards import detect_fake_mode
from torch.utils import _pytree as pytree

from lorac.ir.traces.gate import tracing_whole_call

if TYPE_CHECKING:
    from torch import Tensor, nn

_MODELS = weakref.WeakValueDictionary[str, "nn.Module"]()
_NUMBERS = itertools.count()
BREAKS = (
    "lorac traces a call as one graph without adapters=, in live and baked mode, without extra outputs and listeners, "
    "and without branches that train: docs/modes.md"
)
"""The reason of a break, which Dynamo says where the graph must be whole."""
_NONE = -6_214_881_570_239
"""The number that stands for None, which torch takes neither as an argument nor as an output of such a function."""


def name_for_traces(module: nn.Module) -> str:
    """Return a name by which a trace finds a model, and that no model had before."""
    name = str(next(_NUMBERS))
    _MODELS[name] = module
    return name


def call_in_one_graph(
    model: str, state: str, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Call a model with tensors in the place of its own, which gradients reach.

    Args:
        model: its name, another one for other adapters.
        state: the active adapters and which modules train, by which graphs differ.
        tensors: the parameters and buffers by name.
        args, kwargs: of the call.
    """
    arguments = pytree.tree_map(lambda value: _NONE if value is None else value, (args, kwargs))
    return _restore_none(trace_call(model, state, tensors, arguments))


@torch._dynamo.nonstrict_trace
def trace_call(model: str, state: str, tensors: Mapping[str, Tensor], arguments: Any) -> Any:
    """Call a model as ``call_in_one_graph`` does; torch traces it as it runs."""
    args, kwargs = _restore_none(arguments)
    # Where Dynamo refuses an argument or the output, such as a cache of transformers', it runs this without a trace.
    with tracing_whole_call() if detect_fake_mode(list(tensors.values())) else nullcontext():
        output = torch.func.functional_call(_MODELS[model], dict(tensors), args, kwargs)
    return pytree.tree_map(lambda value: _NONE if value is None else value, output)


def _restore_none(tree: Any) -> Any:
    return pytree.tree_map(lambda value: None if type(value) is int and value == _NONE else value, tree)
