"""Example inputs as tensors."""

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lorac.argument_types import Fields

Inputs = Fields
"""Argument of forward -> its value: a tensor, tensors in dicts, lists and tuples, or anything else."""


def convert_to_tensors(inputs: object) -> object:
    """Return example inputs as tensors with memory of their own; a single tensor or array becomes a tuple of one."""
    copied = map_inputs(_copy, inputs)
    if isinstance(inputs, Tensor | np.ndarray):
        return (copied,)
    return tuple(copied) if isinstance(copied, list) else copied


def map_inputs(change: Callable[[object], object], inputs: object) -> object:
    """Return inputs with each value changed, in any nesting; any mapping becomes a dict."""
    if isinstance(inputs, Mapping):
        return {name: map_inputs(change, inner) for name, inner in inputs.items()}
    if pytree.tree_is_leaf(inputs):
        return change(inputs)
    inner = functools.partial(map_inputs, change)
    return pytree.tree_map(inner, inputs, is_leaf=lambda value: isinstance(value, Mapping))


def _copy(value: object) -> object:
    """Return a tensor, or an array of numbers as a tensor, in memory of its own; any other value itself.

    One tensor given for two arguments becomes two, since a trace takes one tensor for one input.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" else value
