"""Writes into merged weights by the library of lorac-native, compared with torch's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorac
from lorac.ir.slots.weight_writes import SparseWrites, write_product
from lorac.native_library import find_native_library
from tests.limits import NATIVE
from tests.native.library import installed, needs_compiler

pytestmark = needs_compiler
X = torch.linspace(-1, 1, 80).reshape(2, 40)
MANY = 40_000
"""Positions that two threads share."""


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 33, MANY])
def test_values_are_where_torch_puts_them(dtype: torch.dtype, count: int, native: Path) -> None:
    generator = torch.Generator().manual_seed(count)
    memory = torch.randint(-100, 100, (3, MANY), generator=generator).to(dtype)
    positions = torch.randperm(memory.numel(), generator=generator)[:count].sort().values
    values = torch.randint(-100, 100, (count,), generator=generator).to(dtype)
    expected = memory.clone()
    expected.view(-1)[positions] = values
    other = torch.zeros_like(memory, dtype=torch.float64)
    writes = SparseWrites()
    writes.add(memory, positions, ~values if dtype == torch.int8 else -values)  # the next write goes over it
    writes.add(other, positions, values.double())
    writes.add(memory, positions, values)
    writes.run()
    assert torch.equal(memory, expected)
    assert torch.equal(other.view(-1)[positions], values.double())
    assert other.count_nonzero() == values.count_nonzero()


@pytest.mark.parametrize(("rows", "rank", "columns"), [(1, 1, 1), (67, 3, 45), (130, 16, 256), (9, 0, 20)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_is_added_in_either_layout(
    rows: int, rank: int, columns: int, transposed: bool, native: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, left, right = (
        torch.randn(shape, generator=generator) for shape in ((rows, columns), (rows, rank), (rank, columns))
    )
    outs = []
    for threads in (1, 2):
        base = weight.t().contiguous().t() if transposed else weight
        out = torch.empty_like(base)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        write_product(base, left, right, out)
        outs.append(out)
    expected = weight.double() + left.double() @ right.double()
    assert torch.equal(*outs)
    assert (outs[0] - expected).norm() <= NATIVE * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rejects_gradients_of_reads_before_a_write(dtype: torch.dtype, native: Path) -> None:
    memory, x = torch.ones(4, 4, dtype=dtype), torch.ones(2, 4, dtype=dtype, requires_grad=True)
    y = (x @ memory).sum()
    writes = SparseWrites()
    writes.add(memory, torch.tensor([3]), torch.tensor([2.0], dtype=dtype))
    writes.run()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.medium("eager", cases=["onnxruntime"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_sparse_swaps_are_bit_equal_with_the_library_and_without(target: str, native: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.ReLU(), torch.nn.Linear(24, 40)).eval()
    methods = {name: lorac.SHiRA(ratio=0.1, targets="all-linear") for name in "ab"}
    adapters = dict(lorac.compile(model, methods).adapters)
    for adapter in adapters.values():
        for tensor in adapter.parameters():
            if tensor.is_floating_point():
                tensor.data.normal_()
    answers = []
    for folder in (native, None):
        with installed(folder):
            assert (find_native_library() is None) == (folder is None)
            compiled = lorac.compile(model, adapters, target=target, mode="fused", active=None, example_inputs=(X,))
            choices = (None, "a", "b", {"a": 0.5, "b": 2.0}, "a", None)
            answers.append([_answer(compiled, choice) for choice in choices])
    with_library, without = answers
    assert all(map(torch.equal, with_library, without))
    assert torch.equal(with_library[0], with_library[-1]) and torch.equal(with_library[1], with_library[-2])
    assert not torch.equal(with_library[1], with_library[2])


def _answer(compiled: lorac.Compiled, choice: object) -> torch.Tensor:
    compiled.swap(choice)
    return compiled(X).detach().clone()
