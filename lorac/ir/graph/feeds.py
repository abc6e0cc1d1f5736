"""The tensors that feed a lowered program: slot inputs, cache inputs, and the inputs of a call."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from lorac.errors import ChoiceError
from lorac.ir.calls.call import not_numbers_error
from lorac.ir.graph.attention_ops import NEW_LENGTHS, PAST_LENGTHS, is_past_input
from lorac.ir.graph.graph import Graph, SlotInput
from lorac.ir.sites.site import factor_dtype
from lorac.ir.slots.places import as_place
from lorac.ir.slots.plans import SitePlan, SiteSlots
from lorac.ir.slots.program_values import record_extra_outputs
from lorac.ir.slots.roles import slot_name, strength_role


def collect_slot_tensors(
    inputs: Mapping[str, SlotInput], plans: Mapping[str, SitePlan], slots: Mapping[str, SiteSlots]
) -> dict[str, Tensor]:
    """Return the tensor of each slot input; idle branches get zeros."""
    tensors: dict[str, Tensor] = {}
    by_site: dict[str, dict[str, Tensor]] = {}
    for name, slot in inputs.items():
        if slot.members:
            tensors[name] = torch.cat([slots[member].tensors[slot.role] for member in slot.members], -1)
            continue
        if slot.site not in by_site:
            by_site[slot.site] = slots[slot.site].named()
        filled = by_site[slot.site].get(slot.role)
        if filled is not None:
            tensor = filled
        else:  # the strength or a parameter of an idle branch
            plan = plans[slot.site]
            tensor = torch.zeros(plan.branch_shapes()[slot.role], dtype=factor_dtype(plan.site.dtype))
        tensors[name] = as_place(tensor, by_token=slot.by_token) if slot.placed else tensor
    return tensors


def select_reached_plans(inputs: Mapping[str, SlotInput], plans: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
    """Return the plans of the sites that have slot inputs: the sites that the program reaches."""
    reached = {path for slot in inputs.values() for path in (slot.site, *slot.members)}
    return {path: plan for path, plan in plans.items() if path in reached}


def convert_input(name: str, value: object, dtype: torch.dtype | None) -> Tensor:
    """Convert a call's value for an input to the contiguous tensor that the program takes.

    Integers of any width and floating-point values of any precision are cast to the dtype of the program.

    Args:
        name: the input's name.
        value: a tensor, an array or a sequence of numbers.
        dtype: the program's dtype; None if torch has no name for it.

    Raises:
        ChoiceError: the value is of another kind.
    """
    try:
        if isinstance(value, np.ndarray) and min(value.strides, default=0) < 0:  # torch cannot view these
            value = value.copy()
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise not_numbers_error(name, error) from error
    if dtype is None or tensor.dtype == dtype:
        return tensor.contiguous()
    is_number = tensor.ndim == 0 and tensor.dtype is not torch.bool  # such as a timestep, integer or float
    if tensor.is_floating_point() != dtype.is_floating_point and not (is_number and dtype.is_floating_point):
        raise ChoiceError(
            f"input '{name}' is {tensor.dtype}; the program takes {dtype}",
            next_step=f"give it as {dtype}, which the model takes",
        )
    return tensor.to(dtype).contiguous()


CacheInputShape = tuple[tuple[int | None, ...], torch.dtype]
"""Sizes of an input, None for a size that varies, and its dtype."""
_ENCODED_LENGTH = 3
"""Length of artificial encoder outputs."""


def make_empty_cache(
    shapes: Mapping[str, CacheInputShape],
    ids: Tensor,
    encoder_outputs: Mapping[str, CacheInputShape] | None = None,
) -> dict[str, Tensor]:
    """Make the inputs of an empty cache that has room for a call's tokens.

    Args:
        shapes: input for a layer's keys or values, or for a state -> its sizes; those that vary behind the first, which
            is that of rows, are the number of tokens that there is room for.
        ids: the call's token ids (batch, length), all new.
        encoder_outputs: inputs for encoder outputs, which are filled with made-up numbers.
    """
    batch, length = ids.shape
    made = {
        name: torch.full((batch,), count, dtype=torch.int32)
        for name, count in {PAST_LENGTHS: 0, NEW_LENGTHS: length}.items()
    }
    for name, (sizes, dtype) in shapes.items():
        made[name] = torch.zeros(batch, *(length if size is None else size for size in sizes[1:]), dtype=dtype)
    for name, (sizes, dtype) in (encoder_outputs or {}).items():
        shape = (batch, *(_ENCODED_LENGTH if size is None else size for size in sizes[1:]))
        numbers = torch.arange(math.prod(shape)).cos().reshape(shape)
        made[name] = numbers.to(dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
    return made


def cache_input_shapes(graph: Graph, holds: Callable[[str], bool] = is_past_input) -> dict[str, CacheInputShape]:
    """Return shape and dtype of the cache inputs whose names ``holds`` accepts; by default keys, values and states."""
    values = {name: graph.node(node).meta["val"] for name, node in graph.cache_inputs.items() if holds(name)}
    return {
        name: (tuple(size if isinstance(size, int) else None for size in value.shape), value.dtype)
        for name, value in values.items()
    }


def group_aux_outputs(extra: Mapping[str, object], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    """Group the extra outputs of active branches by name and site."""
    aux: dict[str, dict[str, object]] = {}
    emitted: dict[str, dict[str, list[object]]] = {}
    for key, output in extra.items():
        name, _, place = key.partition(":")
        path, _, branch = place.rpartition(":")
        strengths = tensors[slot_name(path, strength_role(branch))]
        if not strengths.any():
            continue
        value = output
        if not strengths.all():  # NaN, or 0 in integers, in the rows of places whose branch is off
            rows = torch.as_tensor(output).clone()
            idle = (strengths == 0).flatten().repeat_interleave(rows.shape[0] // strengths.shape[0])
            rows[idle] = torch.nan if rows.is_floating_point() else 0
            value = rows if isinstance(output, Tensor) else rows.numpy()
        emitted.setdefault(path, {}).setdefault(name, []).append(value)
    for path, found in emitted.items():
        record_extra_outputs(aux, path, found)
    return aux
