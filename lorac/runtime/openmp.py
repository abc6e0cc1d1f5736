"""OpenMP, by which torch computes on several threads."""

import functools
from contextlib import AbstractContextManager
from typing import Any

import torch


def on_one_thread() -> AbstractContextManager[object]:
    """Keep torch's operators to the calling thread.

    An operator on the logits of one token is large enough for torch to share it out. The other threads then spin for
    milliseconds, on the cores on which the engine computes the next token: sampling doubled the time of a token.
    """
    torch.get_num_threads()  # torch sets the number of a new thread late, which would undo the limit
    limited: AbstractContextManager[object] = _controller().limit(limits=1, user_api="openmp")
    return limited


@functools.cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
