"""Where the values of an adapter's file stand in its slots, so that the values are written straight into slots.

The slots of most adapters hold the values of their file in another order, some of them times a number. Which value
stands where depends on the structure of the adapter alone. It is found once for a structure: an adapter is prepared
whose values are the numbers 1, 2, … of its values, and the numbers in its slots show the places. Only formulas in which
every step is a view or a product with a number are followed (``Reduction.follow``).
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap

import torch
from torch import Tensor

from lorac.adapters.stored import SlotLayout
from lorac.ir.algebra.reduction import FACTOR
from lorac.ir.slots.composition import ComposedWeights

_Spot = tuple[tuple[int, int], ...]
"""The bounds of a part of a slot, along each axis."""
_INDEX = re.compile(r"\d+")
_MOST_BOXES = 100
"""The most parts of a slot; an adapter that needs more is read by its format."""


@dataclass(frozen=True)
class _Move:
    """Values that stand at equal distances both in the file and in a stack of slots.

    Attributes:
        stack: the index of the stack in the layout.
        box: the part of the stack (slots, …).
        offset: the first value in the file.
        strides: the distance between values in the file, along each axis of the part.
        factor: the number by which the values are multiplied.
    """

    stack: int
    box: tuple[slice, ...]
    offset: int
    strides: tuple[int, ...]
    factor: float


class SlotMoves:
    """The moves from the values of a file into the slots of its adapter.

    Args:
        snapshot: the numbered adapter, composed at every site.
        numbered: slot -> the numbers of its values; 0 stands for a zero that pads.
        dtypes: slot -> its dtype.
        factors: the number by which values are multiplied, by the multiple of ``FACTOR`` in their numbers.

    Attributes:
        layout: the layout of the slots in memory.

    Raises:
        ValueError: the places of some values follow no pattern of equal distances.
    """

    def __init__(
        self,
        snapshot: ComposedWeights,
        numbered: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        factors: Sequence[float],
    ) -> None:
        slots = {name: torch.empty(t.shape, dtype=dtypes[name], device="meta") for name, t in numbered.items()}
        self.layout, self._padded, self._moves = SlotLayout.of(snapshot, slots), False, list[_Move]()
        for index, (_, names) in enumerate(self.layout.stacks):
            alike = defaultdict[tuple[str, _Spot, tuple[int, ...], float], list[tuple[int, int]]](list)
            for place, name in enumerate(names):
                for spot, first, strides in _split(numbered[name]):
                    factor, number = divmod(first, FACTOR)
                    self._padded |= not number
                    if number:
                        alike[_INDEX.sub("", name), spot, strides, factors[factor]].append((place, number - 1))
            for (_, spot, strides, scale), found in alike.items():
                for places, offset, step in _find_runs(found):
                    self._moves.append(_Move(index, (places, *starmap(slice, spot)), offset, (step, *strides), scale))

    @torch.no_grad()
    def fill(self, values: Tensor, memory: Tensor) -> None:
        """Write the values of a file into the memory of its adapter's slots (``SlotLayout.view``)."""
        if self._padded:
            memory.zero_()
        stacks, begin = self.layout.split(memory), int(values.storage_offset())
        for move in self._moves:
            target = stacks[move.stack][move.box]
            target.copy_(values.as_strided(target.shape, move.strides, begin + move.offset))
            if move.factor != 1:
                target.mul_(move.factor)


def _strides(numbers: Tensor) -> tuple[int, ...]:
    """Return the differences between the first number and its neighbours, along each axis."""
    first = numbers[(0,) * numbers.dim()]
    return tuple(
        int(numbers.select(axis, 1)[(0,) * (numbers.dim() - 1)] - first) if numbers.shape[axis] > 1 else 0
        for axis in range(numbers.dim())
    )


def _split(numbers: Tensor) -> Iterator[tuple[_Spot, int, tuple[int, ...]]]:
    """Yield boxes of numbers at equal distances along each axis: their bounds, first number and distances.

    A box of zeros has the first number 0.

    Raises:
        ValueError: there are no such boxes, or too many.
    """
    boxes: list[_Spot] = [tuple((0, size) for size in numbers.shape)]
    for _ in range(_MOST_BOXES):
        if not boxes:
            return
        box = boxes.pop()
        part = numbers[tuple(starmap(slice, box))]
        first, last, strides = int(part.flatten()[0]), int(part.flatten()[-1]), _strides(part)
        expected = torch.full((), first)
        for stride, size in zip(strides, part.shape, strict=True):
            expected = expected[..., None] + torch.arange(size) * stride
        one_kind = (first and first // FACTOR == last // FACTOR) or first == last == 0
        if one_kind and min(strides) >= 0 and torch.equal(expected, part):
            yield box, first, strides
            continue
        axis, size = _find_break(part)
        begin, end = box[axis]
        boxes += [(*box[:axis], own, *box[axis + 1 :]) for own in ((begin, begin + size), (begin + size, end))]
    raise ValueError("the numbers lie in too many boxes")


def _find_break(part: Tensor) -> tuple[int, int]:
    """Return an axis, and the number of entries along it before the distance between entries changes."""
    for axis, size in enumerate(part.shape):
        steps = part.diff(dim=axis).movedim(axis, 0).reshape(size - 1, part.numel() // size)
        even = (steps == steps[:, :1]).all(1)
        if bool(even.any()):
            step = steps[even][0, 0]
            regular = even & (steps[:, 0] == step) & (step >= 0) & (step < FACTOR // 2)
            if not bool(regular.all()):
                return axis, int(regular.int().argmin()) + 1
    raise ValueError("the numbers follow no pattern")


def _find_runs(found: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, int, int]]:
    """Yield runs of equal distances between places and between offsets: the places, the first offset, the distance."""
    begin = 0
    while begin < len(found):
        (place, offset), end = found[begin], begin + 1
        apart = (1, 0)
        while end < len(found):
            step = (found[end][0] - found[end - 1][0], found[end][1] - found[end - 1][1])
            if step[1] < 0 or (end > begin + 1 and step != apart):
                break
            apart, end = step, end + 1
        yield slice(place, found[end - 1][0] + 1, apart[0]), offset, apart[1]
        begin = end
