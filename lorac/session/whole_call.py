"""Calls of a compiled model inside torch.compile, as one graph.

Dynamo cannot trace lorac's own code: its locks, its caches and the state of a call. So torch traces a call while it
runs (``torch._dynamo.nonstrict_trace``), and reuses the graph while all arguments besides tensors are equal. These
arguments therefore name everything that the graph depends on: the model, its adapters, the choice, the training modes.
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
"""The reason of a graph break, which Dynamo reports under ``fullgraph=True``."""
_NONE = -6_214_881_570_239
"""The number that stands for None, which torch takes neither as an argument nor as an output of such a function."""


def name_for_traces(module: nn.Module) -> str:
    """Return a new name, by which a trace finds the model."""
    name = str(next(_NUMBERS))
    _MODELS[name] = module
    return name


def call_in_one_graph(model: str, state: str, tensors: Mapping[str, Tensor], arguments: Any) -> Any:
    """Call a model with the given tensors in place of its own, so that gradients reach them.

    Args:
        model: the model's name, which changes with its adapters.
        state: a key of the active adapters and the training modes; each key has a graph of its own.
        tensors: the parameters and buffers by name.
        arguments: the positional arguments of the call, and those by name.
    """
    arguments = pytree.tree_map(lambda value: _NONE if value is None else value, arguments)
    return _restore_none(trace_call(model, state, tensors, arguments))


@torch._dynamo.nonstrict_trace
def trace_call(model: str, state: str, tensors: Mapping[str, Tensor], arguments: Any) -> Any:
    """Call a model as ``call_in_one_graph`` does; torch traces the call while it runs."""
    args, kwargs = _restore_none(arguments)
    # Where Dynamo refuses an argument or the output, such as a cache of transformers', it runs this without a trace.
    with tracing_whole_call() if detect_fake_mode(list(tensors.values())) else nullcontext():
        output = torch.func.functional_call(_MODELS[model], dict(tensors), args, kwargs)
    return pytree.tree_map(lambda value: _NONE if value is None else value, output)


def _restore_none(tree: Any) -> Any:
    return pytree.tree_map(lambda value: None if type(value) is int and value == _NONE else value, tree)
