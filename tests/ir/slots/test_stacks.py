"""Tensors one behind the other in memory are found, and only those."""

from __future__ import annotations

import pytest
import torch

from lorac.ir.slots.stacks import StackShape, find_stacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_tensor_of_a_stack_is_aligned_and_contiguous(dtype: torch.dtype) -> None:
    stack = StackShape(4, (3, 5), dtype).new()
    assert stack.shape == (4, 3, 5)
    assert all(tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 for tensor in stack)


def test_runs_of_neighbours_are_found_in_order() -> None:
    stack, other = StackShape(5, (3, 1), torch.float32).new().normal_(), torch.randn(3, 1)
    first, second, third, fourth, fifth = stack
    cases = {
        (5,): [first, second, third, fourth, fifth],
        (3,): [first, third, fifth],
        (2, 1, 2): [first, second, other, fourth, fifth],
        (2, 1): [first, second, fourth],
        (1, 1): [second, first],
        (1, 2): [first[:2], second, third],
        (3, 1): [other, other, other, first.double()],
        (): [],
    }
    for counts, tensors in cases.items():
        found = find_stacks(tensors)
        assert tuple(map(len, found)) == counts
        for tensor, expected in zip((one for stack in found for one in stack), tensors, strict=True):
            assert torch.equal(tensor, expected)
            assert tensor.data_ptr() == expected.data_ptr(), "nothing is copied"


def test_stacks_empty_tensors() -> None:
    found = find_stacks([torch.empty(1, 4, 0) for _ in range(3)])
    assert [tuple(stack.shape) for stack in found] == [(3, 1, 4, 0)]
