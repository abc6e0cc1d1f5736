"""Truncations in NumPy float64: their error is the norm of the singular values that they leave out."""

import numpy as np
import pytest
import torch

from lorac.adapters.truncation import measure_effective_rank, truncate_matrix, truncate_product
from lorac.testing import assert_close
from tests.limits import PROJECTED

DRAWN = np.random.default_rng(3)


def matrix(out, columns, decay=0.7, rank=None):
    """A matrix (out, in) whose singular values fall."""
    size = rank or min(out, columns)
    u, v = (np.linalg.qr(DRAWN.normal(size=(n, size)))[0] for n in (out, columns))
    return torch.from_numpy((u * decay ** np.arange(size)) @ v.T)


def error_of(cut, whole):
    made = cut.b.double().numpy() @ cut.a.double().numpy()
    return np.linalg.norm(whole.numpy() - made) / np.linalg.norm(whole.numpy())


def assert_same(found, expected, dtype=torch.float64):
    """Two ways to the same number."""
    assert_close(torch.tensor(found, dtype=dtype), torch.tensor(expected, dtype=dtype))


def tail(whole, rank):
    s = np.linalg.svd(whole.numpy(), compute_uv=False)
    return np.linalg.norm(s[rank:]) / np.linalg.norm(s)


@pytest.mark.parametrize("shape", [(9, 6), (300, 700), (520, 270)])
def test_a_rank(shape):
    whole = matrix(*shape)
    cut = truncate_matrix(whole, 5)
    assert cut.rank == 5
    assert_same(error_of(cut, whole), tail(whole, 5))
    assert_same(cut.error, tail(whole, 5))


def test_a_rank_of_values_that_hardly_fall():
    """Random projections are as good as the best within some per cent where all directions matter alike."""
    whole = matrix(600, 500, decay=0.998)
    cut = truncate_matrix(whole, 20)
    assert_same(cut.error, error_of(cut, whole))
    assert tail(whole, 20) <= cut.error <= (1 + PROJECTED) * tail(whole, 20)


@pytest.mark.parametrize("shape", [(9, 6), (300, 700)])
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_a_tolerance(shape, tolerance):
    whole = matrix(*shape)
    cut = truncate_matrix(whole, tolerance=tolerance)
    assert error_of(cut, whole) <= tolerance < tail(whole, cut.rank - 1)


def test_a_rank_bounds_a_tolerance():
    whole = matrix(9, 6)
    assert truncate_matrix(whole, 2, 1e-3).rank == 2
    assert truncate_matrix(whole, 5, 0.5).rank == truncate_matrix(whole, tolerance=0.5).rank < 5


@pytest.mark.parametrize("shape", [(9, 6), (300, 700)])
def test_the_smallest_exact_rank(shape):
    whole = matrix(*shape, rank=4)
    for dtype in (torch.float64, torch.float32):
        cut = truncate_matrix(whole.to(dtype))
        assert cut.rank == 4
        assert_close(cut.b @ cut.a, whole.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factors_without_their_product(dtype):
    b, a = matrix(40, 12).to(dtype), matrix(12, 30).to(dtype)
    whole = b.double() @ a.double()
    for rank in (3, 7):
        cut = truncate_product(b, a, rank)
        assert (cut.rank, cut.a.dtype, cut.b.dtype) == (rank, dtype, dtype)
        assert_same(cut.error, tail(whole, rank), torch.promote_types(dtype, torch.float32))
    twice = truncate_product(torch.cat([b, b], 1), torch.cat([a, a]))
    assert twice.rank == 12
    same = truncate_product(b, a)
    assert same.a is a
    assert same.b is b
    assert same.error == 0


def test_chooses_one_rank_for_a_stack():
    stack = torch.stack([matrix(9, 6, rank=2), matrix(9, 6, rank=3)])
    assert truncate_matrix(stack).rank == 3
    assert truncate_matrix(stack, tolerance=0.3).error <= 0.3
    b, a = torch.linalg.qr(stack)
    assert_close(truncate_product(b, a).b @ truncate_product(b, a).a, stack)


def test_keeps_a_matrix_of_zeros():
    for cut in (truncate_matrix(torch.zeros(5, 4)), truncate_product(torch.zeros(5, 3), torch.rand(3, 4))):
        assert (cut.rank, cut.error, float(cut.b.abs().sum())) == (1, 0.0, 0.0)


def test_results_do_not_depend_on_the_random_state():
    whole = matrix(300, 700, decay=0.99)
    first = truncate_matrix(whole, 3)
    state = torch.get_rng_state()
    assert torch.equal(truncate_matrix(whole, 3).a, first.a)
    assert torch.equal(torch.get_rng_state(), state)


def test_effective_rank():
    assert_same(measure_effective_rank(torch.tensor([2.0, 2.0, 2.0])), 3.0)
    assert measure_effective_rank(torch.tensor([1.0, 0.0])) == 1
    assert measure_effective_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize("tolerance", [1e-3, 1e-4, 1e-5])
def test_float32_keeps_to_a_small_tolerance(tolerance):
    """Squares of float32 hide errors below the root of its precision; the error is that of the result all the same."""
    whole = matrix(300, 700, rank=8).float()
    cut = truncate_matrix(whole, 8, tolerance)
    assert cut.rank <= 8
    assert max(cut.error, error_of(cut, whole.double())) <= tolerance
    falling = matrix(300, 700, decay=0.5).float()
    assert error_of(truncate_matrix(falling, tolerance=tolerance), falling.double()) <= tolerance
