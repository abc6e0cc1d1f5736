"""Limits on the processor time and the memory that reading one file may take, beyond the file itself.

While a file is read, an account is open. It is charged the processor time of the thread, except in ``pause_clock``
blocks, whose time grows with the sizes of the file and the model. It is also charged the memory that a number in the
file asks for (``claim_memory``). When no file is read, time is not counted.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lorac.context_values import run_with_value
from lorac.errors import FormatError

T = TypeVar("T")

_STEPS_PER_CHECK = 512
_NEXT_STEP = "the file asks for more than its size explains; if you trust it: with lorac.budget({}=…):"


@dataclass(frozen=True, kw_only=True)
class ReadBudget:
    """The limits for reading one file.

    Attributes:
        seconds: processor time, without the time that grows with the file's tensors and the model.
        bytes: memory, without the file's contents.
        operations: multiplications and additions of a call of a loaded eager artifact; None for a number that grows
            with its inputs and weights.
        download: bytes that may be downloaded for a name on the hub, in a store or on a web server.
    """

    seconds: float = 2.0
    bytes: int = 256 << 20
    operations: float | None = None
    download: int = 32 << 30


@dataclass
class _BudgetAccount:
    """The time and memory that one file has taken so far."""

    file: str
    budget: ReadBudget
    started: float
    claimed: int = 0
    is_paused: bool = False


_DEFAULT = ReadBudget()
_budget: ContextVar[ReadBudget] = ContextVar("budget", default=_DEFAULT)
_is_trusted: ContextVar[bool] = ContextVar("is_trusted", default=False)
_account: ContextVar[_BudgetAccount | None] = ContextVar("account", default=None)


@contextlib.contextmanager
def budget(
    *,
    seconds: float | None = None,
    bytes: int | None = None,
    operations: float | None = None,
    download: int | None = None,
) -> Iterator[ReadBudget]:
    """Change the limits for every file that is read inside the block, by this thread or task.

    Args:
        seconds: processor time; default: unchanged, initially 2.
        bytes: memory beyond the file; default: unchanged, initially 256 MiB. It also limits the memory of a call of a
            loaded eager artifact, whose default limit is the machine's memory.
        operations: multiplications and additions that a call of a loaded eager artifact may take; default: unchanged,
            initially in proportion to its inputs and weights, far more than a model takes.
        download: bytes that may be downloaded for a name on the hub, in a store or on a web server; default: unchanged,
            initially 32 GiB.
    """
    given: dict[str, Any] = {"seconds": seconds, "bytes": bytes, "operations": operations, "download": download}
    changed = replace(_budget.get(), **{name: value for name, value in given.items() if value is not None})
    token = _budget.set(changed)
    try:
        yield changed
    finally:
        _budget.reset(token)


def get_chosen_memory() -> int | None:
    """Return the bytes that a ``budget`` block around this code allows, or None."""
    chosen = _budget.get().bytes
    return None if chosen == _DEFAULT.bytes else chosen


def get_chosen_operations() -> float | None:
    """Return the operations that a ``budget`` block around this code allows, or None."""
    return _budget.get().operations


def read_trusted(is_trusted: bool, read: Callable[[], T]) -> T:
    """Read a file while ``is_trusted`` returns whether the caller trusts it."""
    return run_with_value(_is_trusted, is_trusted, read)


def is_trusted() -> bool:
    """Return whether the caller trusts the file that is being read."""
    return _is_trusted.get()


def charge_reading(file: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """Open an account for a file and charge a read to it; files that the read opens use the same account."""
    if _account.get() is not None:
        return read()
    return run_with_value(_account, _BudgetAccount(os.fspath(file), _budget.get(), time.thread_time()), read)


@contextlib.contextmanager
def pause_clock() -> Iterator[None]:
    """Stop counting time in the block, whose time grows with the sizes of the file's tensors or of the model."""
    account = _account.get()
    if account is None or account.is_paused:
        yield
        return
    begun, account.is_paused = time.thread_time(), True
    try:
        yield
    finally:
        account.started += time.thread_time() - begun
        account.is_paused = False


def check_time(step: int = 0) -> None:
    """Check the time of the file that is being read; loops over its contents call it in every turn.

    Args:
        step: the number of the turn; only every 512th turn reads the clock. Default: read the clock now.

    Raises:
        FormatError: the file has taken too long.
    """
    account = _account.get()
    if step % _STEPS_PER_CHECK or account is None or account.is_paused:
        return
    if time.thread_time() - account.started > account.budget.seconds:
        raise FormatError(
            f"reading '{account.file}' takes longer than {account.budget.seconds:g} s of processor time",
            next_step=_NEXT_STEP.format("seconds"),
            code="over_budget",
        )


def check_download(size: int, origin: str) -> None:
    """Check the bytes of a download before they are written.

    Args:
        size: the bytes of all files of the download.
        origin: the name that is downloaded, for the message.

    Raises:
        FormatError: the bytes are more than the budget admits.
    """
    most = _budget.get().download
    if size > most:
        raise FormatError(
            f"the download of {origin} has at least {size} bytes, and a download may have at most {most}",
            next_step=f"load it within `with lorac.budget(download={size}):`, or download it and give its path",
            code="over_budget",
        )


def claim_memory(size: int, reason: str) -> None:
    """Claim memory before allocating it, where a number in a file determines the size.

    Args:
        size: bytes.
        reason: for the message, with a verb: "its tensors are …".

    Raises:
        FormatError: all claims together exceed the budget of the file.
    """
    account = _account.get()
    allowed, claimed = (account.budget, account.claimed) if account else (_budget.get(), 0)
    if claimed + size > allowed.bytes:
        file = f"'{account.file}'" if account else "the file"
        raise FormatError(
            f"{file} would take more than {allowed.bytes >> 20} MiB beyond its size: {reason}, {size} bytes",
            next_step=_NEXT_STEP.format("bytes"),
            code="over_budget",
        )
    if account is not None:
        account.claimed += max(size, 0)
