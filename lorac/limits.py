"""What reading one file may cost, in time and memory beyond the file itself, whatever its contents ask for.

While a file is read there is an account. Everything that runs meanwhile is charged to it in the processor time of the
thread, but for what takes as long as the file or the model is large (``unhurried``), and so is memory that is asked for
by a number and not by contents (``claim``). Where no file is read, nothing is counted.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from lorac.errors import FormatError

_STEPS_PER_CHECK = 512
"""How many small steps ``counted`` takes between two looks at the clock."""


@dataclass(frozen=True, kw_only=True)
class ReadBudget:
    """What reading one file may cost beyond the file.

    Attributes:
        seconds: processor time, not counting what grows with the file's tensors and the model.
        bytes: memory, not counting what the file holds.
    """

    seconds: float = 2.0
    bytes: int = 256 << 20


@dataclass
class _BudgetAccount:
    """What one file has cost so far."""

    file: str
    budget: ReadBudget
    begun: float
    held: int = 0
    unhurried: bool = False


_DEFAULT = ReadBudget()
_budget: ContextVar[ReadBudget] = ContextVar("budget", default=_DEFAULT)
_account: ContextVar[_BudgetAccount | None] = ContextVar("account", default=None)


@contextlib.contextmanager
def budget(*, seconds: float | None = None, bytes: int | None = None) -> Iterator[ReadBudget]:
    """Let every file that is read inside the block cost more, or less, than it may otherwise.

    It holds for the thread, or task, that enters it.

    Args:
        seconds: processor time; default: as it is, 2 at first.
        bytes: memory beyond the file; default: as it is, 256 MiB at first.
    """
    held = _budget.get()
    changed = ReadBudget(
        seconds=held.seconds if seconds is None else seconds, bytes=held.bytes if bytes is None else bytes
    )
    token = _budget.set(changed)
    try:
        yield changed
    finally:
        _budget.reset(token)


@contextlib.contextmanager
def charge_reading(file: str | os.PathLike[str]) -> Iterator[None]:
    """Charge what the block does to an account of this file's own."""
    token = _account.set(_BudgetAccount(os.fspath(file), _budget.get(), time.thread_time()))
    try:
        yield
    finally:
        _account.reset(token)


@contextlib.contextmanager
def pause_clock() -> Iterator[None]:
    """Do not count the time of the block: it grows with the tensors of the file or of the model, and with no number."""
    account = _account.get()
    if account is None or account.unhurried:
        yield
        return
    begun, account.unhurried = time.thread_time(), True
    try:
        yield
    finally:
        account.begun += time.thread_time() - begun
        account.unhurried = False


def check_time() -> None:
    """Look at the clock: what loops over something that a file tells calls it at every turn.

    Raises:
        FormatError: the file's time is over.
    """
    account = _account.get()
    if account is None or account.unhurried:
        return
    if time.thread_time() - account.begun > account.budget.seconds:
        raise FormatError(
            f"reading '{account.file}' takes longer than {account.budget.seconds:g} s of processor time",
            next_step="what it asks for is out of proportion; if you trust it: with lorac.budget(seconds=…):",
            code="over_budget",
        )


def check_time_sometimes(steps: int) -> None:
    """``tick`` now and then, for loops whose turns are shorter than a look at the clock."""
    if steps % _STEPS_PER_CHECK == 0:
        check_time()


def claim_memory(size: int, what: str) -> None:
    """Ask for memory before it is taken, where a number in a file, and no contents, says how much.

    Args:
        size: bytes.
        what: for the message, with a verb: "its tensors are …".

    Raises:
        FormatError: with all that was claimed before it is more than a file may take.
    """
    account = _account.get()
    allowed, held = (account.budget, account.held) if account else (_budget.get(), 0)
    if held + size > allowed.bytes:
        file = f"'{account.file}'" if account else "what is read"
        raise FormatError(
            f"{file} would take more than {allowed.bytes >> 20} MiB beyond its size: {what}, {size} bytes",
            next_step="what it asks for is out of proportion; if you trust it: with lorac.budget(bytes=…):",
            code="over_budget",
        )
    if account is not None:
        account.held += max(size, 0)
