"""Tests whether a formula computes the rows of a batch independently, and for several places at once.

Both are tested by calls on artificial values, since a formula is a function of torch ops for any values.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

from lorac.errors import AdapterError
from lorac.ir.graph.symbolic_shapes import make_size
from lorac.ir.slots.execution import FormulaContext
from lorac.ir.slots.placed_execution import Mapped, SegmentOps, run_in_places
from lorac.ir.slots.plans import BranchSlot, ValueAxis
from lorac.third_party_output import suppress_third_party_output

Size = int | torch.SymInt
_ROWS, _OTHER = 3, 4
"""The number of rows of an artificial call, and the first of its other sizes that vary."""
_PLACES = 2
_NOTHING_CUT = SegmentOps(lambda x, slot, features: x, lambda y, like, features: y)


@dataclass(frozen=True, eq=False)
class FormulaCall:
    """A traced call of a branch's formula, or of ``once``.

    Attributes:
        run: function that runs the formula for one place.
        slot: the branch's slot, with the axes of its inputs and results.
        rows: tensors with one row per row of the batch.
        values: the values that the formula reads, under the names of a context without an owner.
        context: the context, without values.
        results: name of a result -> its axis.
    """

    run: Mapped
    slot: BranchSlot
    rows: Sequence[Tensor]
    values: Mapping[str, Tensor]
    context: FormulaContext
    results: Mapping[str, ValueAxis]

    def why_together(self, batch: torch.SymInt) -> str:
        """Return why the rows of a batch are not computed independently, as a clause; empty if they are."""
        try:
            if self._mixes_rows(batch):
                return "a branch computes the rows of a batch together"
            return self._why_one_place(batch)
        except AdapterError as error:
            return f"a branch does not run for rows of their own ({error.what})"

    def _mixes_rows(self, batch: torch.SymInt) -> bool:
        generator = torch.Generator().manual_seed(0)

        def make(shape: Iterable[Size], dtype: torch.dtype) -> Tensor:
            if not dtype.is_floating_point:
                return torch.ones(tuple(shape), dtype=dtype)
            return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)

        sizes = _name_sizes(batch, _ROWS, (_OTHER + i for i in itertools.count()))
        params = [make(shape, torch.float64) for shape in self.slot.params.values()]
        rows = [make(map(sizes, value.shape), value.dtype) for value in self.rows]
        values = {name: make(map(sizes, value.shape), value.dtype) for name, value in self.values.items()}
        whole = self.run(params, rows, self.context.over(values))
        alone = []
        for i in range(_ROWS):
            own = {n: v[i : i + 1] if self._axis(n) is ValueAxis.ROWS else v for n, v in values.items()}
            alone.append(self.run(params, [value[i : i + 1] for value in rows], self.context.over(own)))
        by_row = {name for name, axis in self.results.items() if axis is ValueAxis.ROWS}
        joined = {name: torch.cat([one[name] for one in alone]) for name in by_row}
        pairs = [(whole[name], joined[name]) for name in by_row]
        pairs += [(whole[name], one[name]) for name in self.results if name not in by_row for one in alone]
        return not all(torch.allclose(a, b, rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True) for a, b in pairs)

    def _axis(self, name: str) -> ValueAxis:
        assert self.slot.axes is not None
        return self.slot.axes[name.replace(":.", ":")]

    def _why_one_place(self, batch: torch.SymInt) -> str:
        """Return why ``torch.vmap`` cannot run the formula for any number of places; empty if it can."""
        environment = ShapeEnv()
        places = make_size(environment, "places", _PLACES, 1)
        numbers = (make_size(environment, f"size_{i}", _OTHER + i) for i in itertools.count())
        sizes = _name_sizes(batch, next(numbers), numbers)

        def make(value: Tensor, first: Sequence[torch.SymInt]) -> Tensor:
            return torch.empty((*first, *map(sizes, value.shape)), dtype=value.dtype)

        with suppress_third_party_output(), FakeTensorMode(shape_env=environment), torch.no_grad():
            params = [torch.empty((places, *shape), dtype=torch.float64) for shape in self.slot.params.values()]
            rows = [make(value, [places]) for value in self.rows]
            shared = {name for name in self.values if self._axis(name) is ValueAxis.NEITHER}
            values = {name: make(v, [] if name in shared else [places]) for name, v in self.values.items()}
            run_in_places(self.run, self.slot, params, rows, self.context.over(values), "", _NOTHING_CUT)
        if statically_known_true(places == _PLACES):
            return "torch.vmap does not batch an op of a branch"
        return ""


_ROUNDING = 1e-6


def _name_sizes(batch: torch.SymInt, rows: Size, others: Iterable[Size]) -> Callable[[Size], Size]:
    """Return a function from sizes of a graph to sizes of an artificial call; it maps equal sizes to equal sizes."""
    known: dict[str, Size] = {str(batch): rows}
    left = iter(others)

    def find(size: Size) -> Size:
        if isinstance(size, int):
            return size
        name = str(size)
        if name not in known:
            known[name] = next(left)
        return known[name]

    return find
