"""Options of the targets that run emitted ONNX files on the CPU too."""

from abc import abstractmethod
from dataclasses import dataclass

from lorac.errors import OptionError, short
from lorac.target.backend import TargetOptions

MAX_THREADS = 1024
"""More threads than a machine has cores for one operator; each takes memory of its own."""


@dataclass(frozen=True, kw_only=True)
class OnnxOptions(TargetOptions):
    """Options that these targets share.

    Attributes:
        threads: threads of one operator, 0 for the library's own choice.
    """

    threads: int = 0

    @abstractmethod
    def check(self) -> None:
        """Raise ``OptionError`` for a value that makes no sense."""
        if not 0 <= self.threads <= MAX_THREADS:
            raise OptionError(
                f"threads cannot be {short(self.threads)}",
                next_step=f"give a number up to {MAX_THREADS}, or 0 for all",
            )
