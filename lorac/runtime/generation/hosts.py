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
from lorac.ir.binding import Bound
from lorac.ir.host.running import random_state_kept
from lorac.ir.slots.reads import BASE, INPUT, PASS, parse
from lorac.runtime.generation.guest import Guest
from lorac.runtime.generation.prompts import CACHE, IDS, MASK
from lorac.runtime.states import State


@dataclass(frozen=True, eq=False, kw_only=True)
class Hosted:
    """One run of some rows by the host itself.

    Attributes:
        graph: which host.
        told: options and inputs, as transformers takes them.
        seeds: one for the run, alone or in a list.
    """

    graph: str
    told: Mapping[str, Any]
    seeds: int | list[int] | None

    def __call__(self, bound: Bound, state: State, other: Bound | None) -> Any:
        """What the rows go on with.

        Args:
            bound, state: the adapters.
            other: those that guess ahead, if any do.
        """
        seed = self.seeds[0] if isinstance(self.seeds, list) else self.seeds
        own = {"use_cache": False} if _wants_whole_text(state) else {}

        def generate(host: Any) -> Any:
            guess = {} if other is None else {"assistant_model": Guest(host, functools.partial(other.lend, self.graph))}
            with _seeded(host, seed), _told_what_is_text(host, told=_reads_mask(state)):
                return host.generate(**{**self.told, **own, **guess})

        return bound.lend(self.graph, generate)


def refuse_prefixes(prefixes: object, why: str) -> None:
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
    with random_state_kept(host):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _told_what_is_text(host: nn.Module, *, told: bool) -> Iterator[None]:
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


def _reads_mask(state: State) -> bool:
    """Whether a branch reads which tokens are text."""
    slots = [term.slot for composed in state.snapshot.composed.values() for _, term in composed.branches]
    return any(parse(name) == (INPUT, MASK) for slot in slots for name in slot.reads)


def _wants_whole_text(state: State) -> bool:
    """Whether a branch attends by itself, or in a pass before the call's own: no cache holds what these attend to."""
    slots = [term.slot for composed in state.snapshot.composed.values() for _, term in composed.branches]
    return any(slot.mixes or any(parse(name)[0] in {BASE, PASS} for name in slot.reads) for slot in slots)
