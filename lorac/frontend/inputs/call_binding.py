"""Calls of a model: example inputs as tensors, and arguments by the names of forward."""

import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.argument_types import Fields
from lorac.frontend.hugging_face import is_hugging_face
from lorac.ir.calls.fixed_arguments import CAPTURE_CONFIG, OUTPUT_SWITCHES

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


def bind_by_name(model: nn.Module, inputs: object) -> dict[str, Any]:
    """Return inputs by the names of forward's arguments, without those that are None."""
    return {name: value for name, value in bind_arguments(model, inputs).items() if value is not None}


def bind_arguments(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """Return inputs by name; a sequence is bound to forward's arguments in order.

    Raises:
        TypeError: forward takes no such arguments.
    """
    return dict(inputs if isinstance(inputs, Mapping) else inspect.signature(model.forward).bind(*inputs).arguments)


def list_positional_arguments(model: nn.Module, inputs: Collection[str]) -> tuple[str, ...]:
    """Return the names of forward's arguments in the order of a positional call.

    Args:
        inputs: inputs of its captured program; those of a ``*args`` are called ``args_0``, ``args_1``, ...
    """
    names: list[str] = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [found for found in inputs if re.fullmatch(rf"{name}_\d+", found)]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
    return tuple(names)


def list_fixed_arguments(model: nn.Module) -> dict[str, object]:
    """Return forward's arguments that are not tensors, with the values a capture gives them: their defaults."""
    parameters = inspect.signature(model.forward).parameters
    found: dict[str, object] = {
        name: p.default for name, p in parameters.items() if isinstance(p.default, bool | int | float | str)
    }
    if is_hugging_face(model):  # there None means the value in the configuration
        found |= {name: getattr(model.config, name) for name in OUTPUT_SWITCHES if hasattr(model.config, name)}
        found |= CAPTURE_CONFIG
    return found
