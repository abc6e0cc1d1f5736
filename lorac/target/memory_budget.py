"""One limit on the memory of adapters and caches in a compiled model.

Prepared adapters, choices bound to the program and cached prompts can be recomputed. They are cached while there is
room, and the least recently used entry is evicted first. An entry in use is not evicted, and counts until its last user
releases it.
"""

import collections
import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from torch import Tensor

from lorac.argument_types import check_type
from lorac.errors import OverBudget

Block = tuple[int, int]
"""The address of some memory and its size in bytes. Tensors that share memory share a block, which counts once."""


class _ChargeBlocks(weakref.ref["Charge"]):
    """A record of the memory that a charge counts; it outlives the charge.

    Attributes:
        blocks: the memory blocks.
    """

    __slots__ = ("blocks",)
    blocks: tuple[Block, ...]


class Charge:
    """Bytes that count as used for as long as this object exists.

    Args:
        budget: the budget that counts them.
    """

    __slots__ = ("__weakref__", "_budget", "counted")

    def __init__(self, budget: "MemoryBudget") -> None:
        self._budget = budget
        self.counted = budget.count(self)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The memory blocks that are counted."""
        return self.counted.blocks

    def cover(self, tensors: Iterable[Tensor]) -> None:
        """Count the memory of these tensors, instead of the memory counted so far; a block counts once in the budget.

        Raises:
            OverBudget: eviction cannot free enough memory; then nothing changes.
        """
        blocks: dict[Block, None] = {}
        held = [*tensors]
        for tensor in dict(zip(map(id, held), held, strict=True)).values():  # slots contain tensors of the adapters
            storage = tensor.untyped_storage()
            if nbytes := storage.nbytes():
                blocks[storage.data_ptr(), nbytes] = None
        self._budget.exchange(self, tuple(blocks))

    def resize(self, nbytes: int) -> None:
        """Change the number of bytes for memory without an address, such as a cache's.

        Raises:
            OverBudget: there is not enough room; then nothing changes.
        """
        self._budget.exchange(self, ((-id(self), nbytes),))


@dataclass(eq=False)
class _Kept:
    """An entry that is cached while there is room.

    Attributes:
        charge: the charge for its memory; None once its owner has released it.
        in_use: whether anyone else references it, so that releasing it would free nothing.
        drop: a function that releases it.
        turn: a number that grows with each use.
    """

    charge: weakref.ref[Charge]
    in_use: Callable[[], bool]
    drop: Callable[[], object]
    turn: int


class MemoryBudget:
    """The bytes that adapters and caches of a compiled model use, and their limit; threads may share it.

    Charges are authoritative: after an interrupt within an update, the sums are recomputed from them.

    Args:
        limit: the maximum number of bytes; None: no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._lock = threading.RLock()
        self._blocks: dict[Block, int] = {}
        self._used = 0
        # Not an OrderedDict: an interrupt in a key's hash would corrupt it.
        self._kept: dict[Hashable, _Kept] = {}
        self._turns = itertools.count()
        self._charges: dict[int, _ChargeBlocks] = {}
        # Charges that are gone. The garbage collector may append at any time, and no interrupt can split an append.
        self._released: collections.deque[weakref.ref[Charge]] = collections.deque()
        self._half_changed = False
        self._limit = limit

    @property
    def limit(self) -> int | None:
        """The maximum number of bytes; None: no limit. Lowering it evicts entries that are not in use."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        check_type(
            limit, (int, type(None)), "the limit of a memory budget", next_step="give a number of bytes, or None"
        )
        before, self._limit = self._limit, limit  # first, so that no other thread claims memory that eviction frees
        try:
            self._make_room(0, limit)
            while limit is not None and self.used > limit:  # another thread may have used an entry while it was evicted
                self._make_room(0, limit)
        except OverBudget:
            self._limit = before
            raise

    @property
    def used(self) -> int:
        """The bytes of entries in use and of cached entries."""
        with self._lock:
            self._settle()
            return self._used

    def count(self, charge: Charge) -> _ChargeBlocks:
        """Register a new charge, and return its record, which is empty."""
        counted = _ChargeBlocks(charge, self._released.append)
        counted.blocks = ()
        self._charges[id(counted)] = counted
        return counted

    def charge(self, tensors: Iterable[Tensor]) -> Charge:
        """Count the memory of tensors until the returned charge is gone (``Charge.cover``).

        Raises:
            OverBudget: eviction cannot free enough memory. Then nothing is evicted.
        """
        charge = Charge(self)
        charge.cover(tensors)
        return charge

    def claim(self, nbytes: int) -> Charge:
        """Count a number of bytes until the returned charge is gone (``Charge.resize``).

        Raises:
            OverBudget: as ``charge``.
        """
        charge = Charge(self)
        charge.resize(nbytes)
        return charge

    def exchange(self, charge: Charge, blocks: tuple[Block, ...]) -> None:
        """Replace the blocks of a charge by others.

        Raises:
            OverBudget: as ``charge``; then the charge is unchanged.
        """
        while (missing := self._try_exchange(charge, blocks)) is not None:
            self._make_room(missing, self._limit)

    def _try_exchange(self, charge: Charge, blocks: tuple[Block, ...]) -> int | None:
        """Replace the blocks of a charge by others; if they do not fit, return the number of bytes that are missing."""
        with self._lock:
            self._settle()
            before, after = {*charge.blocks}, {*blocks}
            if self._limit is not None and (whole := sum([nbytes for _, nbytes in after])) > self._limit:
                raise OverBudget(
                    f"{whole} bytes are needed at once, and the budget has {self._limit}",
                    next_step="ask for less, such as fewer adapters or tokens, or raise compiled.memory.limit",
                ).for_good()
            more = sum([block[1] for block in after - before if block not in self._blocks])
            more -= sum([block[1] for block in before - after if self._blocks[block] == 1])
            if self._limit is not None and more > 0 and self._used + more > self._limit:
                return more
            counted, known = charge.counted, charge.blocks
            self._half_changed = True
            counted.blocks = blocks
            self._add(blocks)
            self._subtract(known)
            self._half_changed = False
            return None

    def keep(
        self,
        key: Hashable,
        charge: Charge,
        take: Callable[[], object],
        drop: Callable[[], object],
        in_use: Callable[[], bool] = lambda: False,
    ) -> None:
        """Cache an entry while there is room, as the most recently used one.

        Args:
            key: the key of the entry.
            charge: the charge for its memory, which the owner references.
            take: a function by which the owner stores the entry; called immediately.
            drop: a function by which the owner releases the entry; called without a lock, by the thread that needs the
                room, and after an interrupt in this method.
            in_use: whether anyone else references the entry, so that releasing it would free nothing.
        """
        try:
            take()
            with self._lock:
                self._kept[key] = _Kept(weakref.ref(charge), in_use, drop, next(self._turns))
        except BaseException:
            drop()
            raise

    def touch(self, key: Hashable) -> None:
        """Mark an entry as the most recently used one, if it is cached."""
        with self._lock:
            if key in self._kept:
                self._kept[key].turn = next(self._turns)

    def forget(self, key: Hashable, kept: _Kept | None = None) -> None:
        """Remove an entry from the budget; the caller releases it.

        Args:
            key: the key of the entry.
            kept: the entry to remove, unless another one has replaced it; default: the current one.
        """
        with self._lock:
            if kept is None or self._kept.get(key) is kept:
                self._kept.pop(key, None)

    def _make_room(self, nbytes: int, limit: int | None) -> None:
        """Evict the least recently used entries until ``nbytes`` bytes are free."""
        with self._lock:
            self._settle()
            for key in [key for key, kept in self._kept.items() if kept.charge() is None]:
                del self._kept[key]
            missing = 0 if limit is None else self._used + nbytes - limit
            victims, dropped = list[tuple[Hashable, _Kept]](), collections.Counter[Block]()
            for key, kept in sorted(self._kept.items(), key=lambda item: item[1].turn):
                charge = kept.charge()
                if missing <= 0:
                    break
                if charge is None or kept.in_use():
                    continue
                victims.append((key, kept))
                dropped.update(charge.blocks)
                missing -= sum(block[1] for block in charge.blocks if dropped[block] == self._blocks[block])
            if missing > 0:
                raise OverBudget(
                    f"a budget of {limit} bytes is too small by {missing}: {nbytes} more are needed, and calls, held "
                    f"choices and caches keep the {self._used} that are taken",
                    next_step="wait until one of these ends, or raise compiled.memory.limit",
                )
        for key, kept in victims:  # without the lock, since owners have locks of their own
            kept.drop()
            self.forget(key, kept)

    def _add(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            count = self._blocks.get(block, 0)
            self._blocks[block] = count + 1
            self._used += 0 if count else block[1]

    def _subtract(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self._blocks[block] -= 1
            if not self._blocks[block]:
                del self._blocks[block]
                self._used -= block[1]

    def _settle(self) -> None:
        """Subtract the blocks of charges that are gone."""
        if self._half_changed:  # by an interrupt: sum the blocks of all charges that still exist
            self._blocks.clear()
            self._used = 0
            self._charges = {key: counted for key, counted in tuple(self._charges.items()) if counted() is not None}
            for counted in tuple(self._charges.values()):
                self._add(counted.blocks)
        while self._released:
            self._half_changed = True
            gone = self._charges.pop(id(self._released.popleft()), None)
            self._subtract(() if gone is None else gone.blocks)
            self._half_changed = False
