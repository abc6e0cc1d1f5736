"""The option for the number of threads per operator, of targets that run emitted ONNX files on the CPU."""

from lorac.errors import OptionError, short

MAX_THREADS = 1024
"""More threads than a machine has cores for one operator; each takes memory of its own."""


def check_threads(threads: int) -> None:
    """Raise ``OptionError`` for an invalid number of threads; 0 lets the library choose."""
    if not 0 <= threads <= MAX_THREADS:
        raise OptionError(
            f"threads cannot be {short(threads)}", next_step=f"give a number up to {MAX_THREADS}, or 0 for all"
        )
