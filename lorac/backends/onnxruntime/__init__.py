"""ONNX Runtime: adapters are inputs of one session, bound anew to swap; nothing is ever rebuilt."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir  # noqa: F401  (a missing library is reported here, with the extra that brings it)
import onnxruntime  # noqa: F401

from lorac.backends.onnxruntime.build import build, host_for

__all__ = ["Options", "build", "host_for"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the onnxruntime target.

    Attributes:
        threads: threads of one operator, 0 for ONNX Runtime's own choice.
        spinning: idle threads wait busily; faster alone, slower for everything else in the process.
        aux: extra outputs to give, such as ``("router",)``; read them from ``compiled.aux``.
        self_test: check after emission that every slot is live (invariant 8).
        providers: execution providers, best first.
    """

    threads: int = 0
    spinning: bool = False
    aux: tuple[str, ...] = ()
    self_test: bool = True
    providers: tuple[str, ...] = ("CPUExecutionProvider",)

    def __post_init__(self) -> None:
        for name in ("aux", "providers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
