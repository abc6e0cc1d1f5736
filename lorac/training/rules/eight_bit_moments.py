"""Moments in 8 bits, block by block, by bitsandbytes' codec: Dettmers et al. 2022, arXiv 2110.02861.

Only bitsandbytes' two codes and its coding of a tensor are used, which it also has for the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorac.errors import translate_import_errors
from lorac.training.rule import State

_BLOCK = 256
_FEWEST = 4096
"""Moments with fewer entries stay in float, as in bitsandbytes' own optimizers."""
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


@dataclass(frozen=True, eq=False)
class OptimizerMoment:
    """An optimizer's moment, decoded for a step.

    Attributes:
        values: to be written into.
        store: puts them back where they are kept.
    """

    values: Tensor
    store: Callable[[], None] = lambda: None


class EightBitMoments:
    """Keeps moments as one byte an entry, and one float for each block of 256.

    Raises:
        MissingExtra: bitsandbytes is not installed.
    """

    def __init__(self) -> None:
        with translate_import_errors():
            from bitsandbytes import functional

        self._functional: Any = functional
        self._codes = {name: functional.create_dynamic_map(signed=signed) for name, signed in _SIGNED.items()}

    def moment(self, state: State, name: str, like: Tensor) -> OptimizerMoment:
        """Return a moment of a state by name, zeros on first use."""
        if like.numel() < _FEWEST:
            return OptimizerMoment(state.setdefault(name, torch.zeros_like(like)))
        values = self._decode(state[name], name, like) if name in state else torch.zeros_like(like)

        def store() -> None:
            code = self._codes[name].to(values.device)
            coded, scales = self._functional.quantize_blockwise(values.float(), code, blocksize=_BLOCK)
            state[name] = {"codes": coded, "largest": scales.absmax}

        return OptimizerMoment(values, store)

    def _decode(self, kept: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
        code = self._codes[name].to(like.device)
        values = self._functional.dequantize_blockwise(
            kept["codes"], absmax=kept["largest"], code=code, blocksize=_BLOCK
        )
        return values.to(like.dtype).view_as(like)
