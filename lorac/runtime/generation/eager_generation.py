"""Generation where the host itself runs: its own ``generate``, with a choice of adapters."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorac.errors import Unavailable
from lorac.frontend.model_runner import preserve_random_state
from lorac.ir.slots.program_values import BASE, INPUT, PASS, parse_value_name
from lorac.runtime.choice_states import ChoiceState
from lorac.runtime.generation.draft_model import DraftModel
from lorac.runtime.generation.prompts import CACHE, IDS, MASK
from lorac.target.engine import BoundProgram


@dataclass(frozen=True, eq=False, kw_only=True)
class EagerGeneration:
    """One run of some rows by the host itself.

    Attributes:
        graph: which host.
        told: options and inputs, as transformers takes them.
        seeds: one for the run, alone or in a list.
    """

    graph: str
    told: Mapping[str, Any]
    seeds: int | list[int] | None

    def __call__(self, bound: BoundProgram, state: ChoiceState, other: BoundProgram | None) -> Any:
        """What the rows go on with.

        Args:
            bound, state: the adapters.
            other: those that guess ahead, if any do.
        """
        seed = self.seeds[0] if isinstance(self.seeds, list) else self.seeds
        own = {"use_cache": False} if _needs_full_sequence(state) else {}

        def generate(host: Any) -> Any:
            guess = (
                {}
                if other is None
                else {"assistant_model": DraftModel(host, functools.partial(other.run_with_model, self.graph))}
            )
            with _seeded(host, seed), _pass_mask(host, told=_reads_mask(state)):
                return host.generate(**{**self.told, **own, **guess})

        return bound.run_with_model(self.graph, generate)


def refuse_prompt_cache(prefixes: object, why: str) -> None:
    """Raise ``Unavailable`` where texts are to be kept between calls: what a host's cache holds is its own business."""
    if prefixes is not None:
        raise Unavailable(
            why,
            next_step="leave prefixes= out; for target='onnxruntime' with cache=True decoders without an encoder "
            "keep them",
        )


@contextlib.contextmanager
def _seeded(host: nn.Module, seed: int | None) -> Iterator[None]:
    """Have random numbers, inside the block, come from a seed; they go on after it as if there was none."""
    if seed is None:
        yield
        return
    with preserve_random_state(host):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _pass_mask(host: nn.Module, *, told: bool) -> Iterator[None]:
    """Have each call of this thread, inside the block, get a mask: transformers leaves one out where all is text."""

    def whole(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != thread or kwargs.get(MASK) is not None or kwargs.get(IDS) is None:
            return None
        rows, new = kwargs[IDS].shape[:2]
        cache = kwargs.get(CACHE)
        held = 0 if cache is None else cache.get_seq_length()
        return args, {**kwargs, MASK: kwargs[IDS].new_ones(rows, held + new)}

    thread = threading.get_ident()
    # In front of the engine's own, which keeps what the call was given.
    handle = host.register_forward_pre_hook(whole, prepend=True, with_kwargs=True) if told else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def _reads_mask(state: ChoiceState) -> bool:
    """Whether a branch reads which tokens are text."""
    slots = [term.slot for composed in state.snapshot.composed.values() for _, term in composed.branches]
    return any(parse_value_name(name) == (INPUT, MASK) for slot in slots for name in slot.reads)


def _needs_full_sequence(state: ChoiceState) -> bool:
    """Whether a branch attends by itself, or in a pass before the call's own: no cache holds what these attend to."""
    slots = [term.slot for composed in state.snapshot.composed.values() for _, term in composed.branches]
    return any(slot.mixes or any(parse_value_name(name)[0] in {BASE, PASS} for name in slot.reads) for slot in slots)
