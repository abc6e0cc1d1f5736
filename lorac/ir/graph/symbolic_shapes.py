"""Symbolic sizes of traced values: making them, making examples with them, and writing them as text."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

SYMBOL = re.compile(r"\b[su]\d+\b")
"""torch's symbols for sizes that vary."""


def rename_symbols(text: str, names: Mapping[str, str]) -> str:
    """Replace the symbols in a size written as text, such as ``2*s77``, by their names."""
    return SYMBOL.sub(lambda match: names.get(match.group(), match.group()), text)


def constant_size(size: int | torch.SymInt) -> int | None:
    """Return the constant size of a traced value; None for a size that varies.

    torch keeps the symbol of an axis that the trace fixed, and binds it to a number.
    """
    return size if isinstance(size, int) else size.node.maybe_as_int()


def make_size(environment: ShapeEnv, name: str, hint: int, least: int = 0) -> torch.SymInt:
    """Return the symbolic size of this name; make one of at least ``least`` if the environment has none.

    Args:
        environment: torch's record of symbolic sizes.
        name: the source of the size in torch's record.
        hint: its value in the example, by which torch evaluates conditions on the size.
    """
    from torch._dynamo.source import LocalSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    source = LocalSource(name)
    symbol = environment.source_to_var.get(source.name)
    if symbol is None:
        symbol = environment.create_symbol(
            hint,
            source,
            dynamic_dim=DimDynamic.DYNAMIC,
            constraint_dim=None,
            positive=None,
            do_not_specialize_zero_one=True,
        )
        environment.var_to_range[symbol] = ValueRanges(least, int_oo)
    return environment.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[return-value]  # made of a symbol, so no plain int


def make_example(mode: FakeTensorMode, shape: Sequence[int | torch.SymInt], dtype: torch.dtype) -> torch.Tensor:
    """Return an example of a value: a contiguous fake tensor on the CPU.

    It equals the result of ``torch.empty`` in the mode. With symbolic sizes it takes less time, since the strides are
    computed once; torch multiplies the sizes again for each property of a tensor. Strides across a size of 0 are 0,
    where torch counts such a size as 1; the tensor is empty then.
    """
    strides = [*itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1)][: len(shape)]
    strided = torch.empty(0, dtype=dtype, device="meta").as_strided(tuple(shape), strides[::-1])
    return mode.fake_tensor_converter.from_meta_and_device(mode, strided, torch.device("cpu"))
