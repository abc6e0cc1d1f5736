"""What the onnxruntime target can be told."""

from __future__ import annotations

from dataclasses import dataclass

import onnxruntime as ort

from lorac.errors import UnknownOption, none_of, short
from lorac.ir.engine import TargetOptions

MOST_THREADS = 1024
"""More than any machine has cores for one operator; each takes memory of its own."""


_TIMES = ("asked", "background")


@dataclass(frozen=True, kw_only=True)
class Options(TargetOptions):
    """Options of the onnxruntime target.

    Attributes:
        threads: threads of one operator, 0 for ONNX Runtime's own choice.
        spinning: idle threads wait busily; faster alone, slower for everything else in the process.
        settle: ``"asked"``: weights settle when ``swap(..., settle=True)`` asks; ``"background"``: after every swap.
        cache: keep keys and values, as ``generate`` needs it, of a causal language model of transformers. Calls then
            take ``input_ids`` and an ``attention_mask`` that pads rows on the right; logits of padding are 0.
        providers: execution providers, best first.
    """

    threads: int = 0
    spinning: bool = False
    settle: str = "asked"
    cache: bool = False
    providers: tuple[str, ...] = ("CPUExecutionProvider",)

    @property
    def grows(self) -> bool:
        """Whether the program keeps a cache."""
        return self.cache

    def check(self) -> None:
        """There are two times at which weights settle, and as many threads as a machine may have."""
        if self.settle not in _TIMES:
            raise none_of("settle cannot be", self.settle, _TIMES)
        known = ort.get_all_providers()
        strange = [provider for provider in self.providers if provider not in known]
        if strange or not self.providers:
            raise UnknownOption(
                f"ONNX Runtime has no provider {short(strange)}", next_step=f"it knows {', '.join(known)}"
            )
        if not 0 <= self.threads <= MOST_THREADS:
            raise UnknownOption(
                f"threads cannot be {short(self.threads)}",
                next_step=f"give a number up to {MOST_THREADS}, or 0 for all",
            )
