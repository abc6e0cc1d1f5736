"""Seeds of calls that train: one for each call, and the same one when a checkpoint recomputes the call.

torch's own random state is left alone, so that a model draws what it would without adapters. A checkpoint around a
whole call restores that state and passes the same tensors, which together identify the call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from lorac.errors import Unavailable

_MAX_SEED = (1 << 63) - 1
_MAX_CALLS = 256
"""Number of calls that are remembered, more than any training step recomputes."""


@final
class SeedHistory:
    """The seeds of an engine's calls."""

    def __init__(self) -> None:
        self._calls = itertools.count()
        self._seeds: list[tuple[int, int]] = []

    def seed(self, fingerprint: int) -> int:
        """Return a new seed, or within a backward pass the seed of the earlier call with the same fingerprint.

        Raises:
            Unavailable: a call is recomputed, and no earlier call has the fingerprint.
        """
        if not is_in_backward():
            seed = hash((torch.initial_seed(), next(self._calls))) & _MAX_SEED
            self._seeds = [*self._seeds[1 - _MAX_CALLS :], (fingerprint, seed)]
            return seed
        # A backward pass recomputes the last call first, and each call once.
        index = next((i for i in reversed(range(len(self._seeds))) if self._seeds[i][0] == fingerprint), None)
        if index is None:
            raise Unavailable(
                "a checkpoint recomputes a call that draws random numbers, and no earlier call had these tensors and "
                "this random state of torch",
                next_step="have torch.utils.checkpoint preserve the random state, which is its default, or checkpoint "
                "the model's layers instead of the whole model",
            )
        return self._seeds.pop(index)[1]


def hash_call(arguments: Iterable[object]) -> int:
    """Return a fingerprint of a call: of torch's random state and of the tensors among the arguments."""
    tensors = tuple((value.data_ptr(), tuple(value.shape)) for value in arguments if isinstance(value, Tensor))
    return hash((torch.get_rng_state().numpy().tobytes(), tensors))


def is_in_backward() -> bool:
    """Return whether a backward pass is running, in which only a checkpoint calls the model."""
    return bool(torch._C._current_graph_task_id() != -1)
