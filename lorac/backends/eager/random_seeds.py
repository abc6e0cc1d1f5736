"""Seeds of the random numbers that branches draw in training.

A call draws one seed from torch's generator before the model runs. So ``torch.manual_seed`` makes a call reproducible,
and a training checkpoint with torch's random state resumes it. If ``torch.utils.checkpoint`` recomputes a whole call,
it restores that state; if it recomputes a layer, the call and its seed are known.
"""

from collections import deque
from typing import final

import torch

from lorac.errors import Unavailable

_MAX_SEED = (1 << 63) - 1
_MAX_CALLS = 256
"""Number of calls that are remembered, more than any training step recomputes."""


@final
class SeedHistory:
    """The seeds of an engine's calls."""

    def __init__(self) -> None:
        self._seeds: deque[int] = deque(maxlen=_MAX_CALLS)

    def draw(self) -> int:
        """Draw a seed for a call from torch's CPU generator.

        Raises:
            Unavailable: a backward pass recomputes a call, and no earlier call drew this seed.
        """
        seed = int(torch.randint(_MAX_SEED, (), dtype=torch.int64, device="cpu"))
        if is_in_backward() and seed not in self._seeds:
            raise Unavailable(
                "a checkpoint recomputes a call that draws random numbers, and no earlier call had this random state "
                "of torch",
                next_step="have torch.utils.checkpoint preserve the random state, which is its default, or checkpoint "
                "the model's layers instead of the whole model",
            )
        self._seeds.append(seed)
        return seed


def is_in_backward() -> bool:
    """Return whether a backward pass is running, in which only checkpoints call the model."""
    return bool(torch._C._current_graph_task_id() != -1)
