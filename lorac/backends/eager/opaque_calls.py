"""Calls that torch.compile leaves out of its graphs.

What a site computes depends on the state of the call it is in, which torch.compile cannot see. It would compile one
function anew for every site, up to its limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class OpaqueCall(Generic[T]):
    """A function that runs as it is written, also inside a compiled module.

    Args:
        function: the function.
    """

    def __init__(self, function: Callable[..., T]) -> None:
        self._function = self._plain = function

    def __call__(self, *args: object, **kwargs: object) -> T:
        """Call the function; whoever compiles has imported torch's compiler, which is not imported for this."""
        if self._function is self._plain and "torch._dynamo" in sys.modules:
            self._function = torch.compiler.disable(self._plain)
        return self._function(*args, **kwargs)
