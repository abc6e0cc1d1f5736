"""What a session takes as inputs, and values made to fit: the host's looseness about dtypes, kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnxruntime as ort
import torch

from lorac.ir.graph.feeds import convert_input

Tensor = torch.Tensor
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


@dataclass(frozen=True)
class SessionInput:
    """An input of a session.

    Attributes:
        name: its name.
        dtype: its dtype; None for one that torch has no name for.
    """

    name: str
    dtype: torch.dtype | None

    def fit(self, value: Any) -> Tensor:
        """The value as a contiguous tensor that the session takes.

        Raises:
            ChoiceError: it is of another kind.
        """
        return convert_input(self.name, value, self.dtype)


def session_inputs(session: ort.InferenceSession) -> Mapping[str, SessionInput]:
    """The inputs of a session by name."""
    return {found.name: SessionInput(found.name, _DTYPES.get(found.type)) for found in session.get_inputs()}
