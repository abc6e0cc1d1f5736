"""Seeds of the random numbers that branches draw in training.

A call draws one seed from torch's generator before the model runs. ``torch.manual_seed`` therefore repeats a call, and
a checkpoint with torch's random state resumes it. ``torch.utils.checkpoint`` restores that state where it recomputes
a call or a layer, so that the state tells whose seed it was.
"""

from __future__ import annotations

from typing import final

import torch

from lorac.errors import Unavailable

_MAX_SEED = (1 << 63) - 1
_MAX_STATES = 1 << 14
"""Number of random states that are remembered, more than any training step recomputes."""


@final
class SeedHistory:
    """The seeds of an engine's calls, by torch's random state before the draw and at the sites of the call."""

    def __init__(self) -> None:
        self._seeds: dict[tuple[str, int], int] = {}

    def draw(self) -> int:
        """Return a seed for a call, drawn from torch's generator of the CPU.

        Raises:
            Unavailable: a backward pass recomputes a call, and no earlier call had this random state.
        """
        state = ("call", _hash_state())
        if is_in_backward() and state not in self._seeds:
            raise Unavailable(
                "a checkpoint recomputes a call that draws random numbers, and no earlier call had this random state "
                "of torch",
                next_step="have torch.utils.checkpoint preserve the random state, which is its default, or checkpoint "
                "the model's layers instead of the whole model",
            )
        return self._record(state, int(torch.randint(_MAX_SEED, (), dtype=torch.int64, device="cpu")))

    def at_site(self, seed: int) -> int:
        """Return the seed at a site of a call: the given one, or in a backward pass that of the call it recomputes."""
        state = ("site", _hash_state())
        return self._seeds.get(state, seed) if is_in_backward() else self._record(state, seed)

    def _record(self, state: tuple[str, int], seed: int) -> int:
        self._seeds[state] = seed
        if len(self._seeds) > _MAX_STATES:
            self._seeds.pop(next(iter(self._seeds)))
        return seed


def is_in_backward() -> bool:
    """Return whether a backward pass is running, in which only a checkpoint calls the model."""
    return bool(torch._C._current_graph_task_id() != -1)


def _hash_state() -> int:
    return hash(torch.get_rng_state().numpy().tobytes())
