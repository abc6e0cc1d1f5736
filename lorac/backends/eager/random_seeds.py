"""The randomness of calls that train: a seed for each, which a call that a checkpoint makes again has again.

Torch's own random state is left alone, so that a host draws what it would without adapters. A checkpoint around a whole
call restores that state before it makes the call again, with the same tensors: by these the call is known.
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
"""How many calls are known; no training step has more of which one is made again."""


@final
class SeedHistory:
    """The seeds of an engine's calls."""

    def __init__(self) -> None:
        self._calls = itertools.count()
        self._given: list[tuple[int, int]] = []

    def seed(self, began: int) -> int:
        """The seed of a call that began so (``beginning``): a new one, or within a backward pass the earlier call's.

        Raises:
            Unavailable: it is made again, and no call is known that began so.
        """
        if not is_in_backward():
            given = hash((torch.initial_seed(), next(self._calls))) & _MAX_SEED
            self._given = [*self._given[1 - _MAX_CALLS :], (began, given)]
            return given
        # The last comes first in a backward pass, and is done with after it.
        place = next((i for i in reversed(range(len(self._given))) if self._given[i][0] == began), None)
        if place is None:
            raise Unavailable(
                "a call that draws random numbers is made again by a checkpoint around it, and no call is known that "
                "began with these tensors and this state of torch's random numbers",
                next_step="have torch.utils.checkpoint keep the random state, which it does by itself, or checkpoint "
                "the model's layers, not the whole of it",
            )
        return self._given.pop(place)[1]


def hash_call(given: Iterable[object]) -> int:
    """What tells a call's beginning from another's: the state of torch's random numbers, and the tensors given."""
    tensors = tuple((value.data_ptr(), tuple(value.shape)) for value in given if isinstance(value, Tensor))
    return hash((torch.get_rng_state().numpy().tobytes(), tensors))


def is_in_backward() -> bool:
    """Whether gradients are being computed: what is called then, a checkpoint makes again."""
    return bool(torch._C._current_graph_task_id() != -1)
