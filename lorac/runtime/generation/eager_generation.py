"""Generation where the model itself runs: its own ``generate``, with a choice of adapters."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lorac.errors import Unavailable
from lorac.frontend.model_runner import preserve_random_state
from lorac.ir.slots.prefix import IDS, MASK
from lorac.ir.slots.program_values import BASE, INPUT, PASS, parse_value_name
from lorac.runtime.choice_states import ChoiceState
from lorac.runtime.generation.prompts import CACHE
from lorac.runtime.generation.request import DraftModel, GenerateRequest
from lorac.target.engine import BoundProgram

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput


def generate_eagerly(
    graph: str,
    request: GenerateRequest,
    options: Mapping[str, object],
    seeds: int | list[int] | None,
    bound: BoundProgram,
    state: ChoiceState,
    draft: BoundProgram | None,
) -> torch.Tensor | ModelOutput:
    """Generate some rows in one call of the model's own ``generate``.

    Args:
        graph: the component's name.
        request: the options as the caller gave them.
        options: options and inputs as transformers takes them.
        seeds: the run's seed, or a list of it alone.
        bound, state: the choice of adapters.
        draft: the choice that drafts tokens.
    """
    seed = seeds[0] if isinstance(seeds, list) else seeds
    branches = [term.slot for composed in state.snapshot.composed.values() for _, term in composed.branches]
    reads = [parse_value_name(name) for slot in branches for name in slot.reads]
    # No cache has the keys of a branch with its own attention, or of a pass before the call's own.
    whole = any(slot.mixes for slot in branches) or any(kind in {BASE, PASS} for kind, _ in reads)
    extra: dict[str, object] = {"use_cache": False} if whole else {}

    def generate(model: Any) -> torch.Tensor | ModelOutput:
        if draft is not None:
            extra["assistant_model"] = DraftModel(model, functools.partial(draft.run_with_model, graph), request)
        with contextlib.ExitStack() as stack:
            if seed is not None:
                stack.enter_context(preserve_random_state(model))
                torch.manual_seed(seed)
            if (INPUT, MASK) in reads:
                stack.enter_context(_pass_mask(model))
            return model.generate(**{**options, **extra})

    return bound.run_with_model(graph, generate)


def refuse_prompt_cache(prompt_cache: object, why: str) -> None:
    """Raise ``Unavailable`` where a call gives ``prompt_cache=`` and the program cannot use it, for a reason."""
    if prompt_cache is not None:
        raise Unavailable(
            why,
            next_step="leave prompt_cache= out, or compile a decoder without an encoder for target='onnxruntime' with "
            "cache=True",
        )


def _pass_mask(model: nn.Module) -> RemovableHandle:
    """Add a mask of ones to this thread's calls without one until the handle exits; some branches read the mask."""
    thread = threading.get_ident()

    def add_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if threading.get_ident() != thread or kwargs.get(MASK) is not None or kwargs.get(IDS) is None:
            return None
        rows, new = kwargs[IDS].shape[:2]
        cache = kwargs.get(CACHE)
        past = 0 if cache is None else cache.get_seq_length()
        return args, {**kwargs, MASK: kwargs[IDS].new_ones(rows, past + new)}

    # Prepended, so that it runs before the engine's hook, which records the arguments of the call.
    return model.register_forward_pre_hook(add_mask, prepend=True, with_kwargs=True)
