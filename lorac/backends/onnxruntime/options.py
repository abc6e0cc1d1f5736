"""What the onnxruntime target can be told."""

from __future__ import annotations

from dataclasses import dataclass

from lorac.errors import UnknownOption
from lorac.ir.engine import TargetOptions


@dataclass(frozen=True, kw_only=True)
class Options(TargetOptions):
    """Options of the onnxruntime target.

    Attributes:
        threads: threads of one operator, 0 for ONNX Runtime's own choice.
        spinning: idle threads wait busily; faster alone, slower for everything else in the process.
        settle: ``"asked"``: weights settle when ``swap(..., settle=True)`` asks; ``"background"``: after every swap.
        providers: execution providers, best first.
    """

    threads: int = 0
    spinning: bool = False
    settle: str = "asked"
    providers: tuple[str, ...] = ("CPUExecutionProvider",)

    def check(self) -> None:
        """There are two times at which weights settle."""
        if self.settle not in {"asked", "background"}:
            raise UnknownOption(f"settle cannot be '{self.settle}'", nearest="asked, background")
