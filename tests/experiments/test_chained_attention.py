"""The chained gradient of attention: held against autograd, its error falls with the degree and keeps to its bound."""

import itertools
import math

import pytest
import torch

import lorac
from experiments._chained_attention import (
    AttentionHead,
    chained_gradient,
    exact_gradient,
    polynomial_features,
    softmax_error_bound,
    softmax_factors,
)
from lorac.testing import assert_close
from tests.limits import assert_at_most

LENGTH, WIDTH = 64, 3


def uniform(*shape, size, seed):
    return size * (2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1)


def head(size, *, length=LENGTH, seed=0):
    """Queries and keys with entries up to a size."""
    queries, c2 = (uniform(length, WIDTH, size=size, seed=4 * seed + i) for i in range(2))
    c3, y = (uniform(length, 4, size=1, seed=4 * seed + i) for i in (2, 3))
    w = torch.eye(WIDTH, dtype=torch.float64) + uniform(WIDTH, WIDTH, size=0.2, seed=seed)
    return AttentionHead(queries @ torch.linalg.inv(w), c2, c3, y, w)


def error(size, degree):
    """The largest error of an entry of the gradient, over the largest entry."""
    exact = exact_gradient(head(size))
    return float((chained_gradient(head(size), degree) - exact).abs().max() / exact.abs().max())


def test_the_closed_form_is_the_gradient():
    one = head(1.0, length=6)
    w = one.w.clone().requires_grad_()
    loss = (torch.softmax(one.c1 @ w @ one.c2.t(), -1) @ one.c3 - one.y).square().sum() / 2
    loss.backward()
    assert_close(exact_gradient(one), w.grad)


def test_the_chain_is_the_gradient_where_the_polynomial_is_exp():
    assert_close(chained_gradient(head(0.5), 20), exact_gradient(head(0.5)))


def test_gradients_of_lora_follow_from_those_of_the_weight():
    """W = W*/s + B·A, C1 = s·X: the gradients of A and B are products with that of W."""
    base, a, b = (uniform(*shape, size=0.3, seed=9 + i) for i, shape in enumerate([(3, 3), (2, 3), (3, 2)]))
    one, s = head(0.5), 4.0
    a, b = a.requires_grad_(), b.requires_grad_()
    logits = one.c1 @ (base + s * b @ a) @ one.c2.t()
    ((torch.softmax(logits, -1) @ one.c3 - one.y).square().sum() / 2).backward()
    chained = chained_gradient(AttentionHead(s * one.c1, one.c2, one.c3, one.y, (base / s + b @ a).detach()), 24)
    assert_close(b.detach().t() @ chained, a.grad)
    assert_close(chained @ a.detach().t(), b.grad)


def test_features_are_taylors_polynomial():
    a, b = (uniform(5, WIDTH, size=2, seed=i) for i in range(2))
    inner = a @ b.t()
    assert_close(
        polynomial_features(a, 4) @ polynomial_features(b, 4).t(), sum(inner**t / math.factorial(t) for t in range(5))
    )
    assert polynomial_features(a, 4).shape == (5, math.comb(WIDTH + 4, 4))
    with pytest.raises(lorac.OptionError, match="no degree -1"):
        polynomial_features(a, -1)


def test_the_error_falls_with_the_degree_below_the_threshold_only():
    """√ln 64 = 2.04. Of entries up to 0.5 two degrees more divide the error by over fifty, of 1 by over five."""
    for size, divisor in ((0.5, 50), (1.0, 5)):
        falling = [error(size, degree) for degree in (2, 4, 6)]
        assert all(later * divisor < earlier for earlier, later in itertools.pairwise(falling))
    assert error(4.0, 6) > 0.1


@pytest.mark.parametrize("size", [0.3, 0.5, 0.8])
def test_softmax_keeps_to_its_bound(size):
    for seed, degree in itertools.product(range(3), (2, 4, 6)):
        one = head(size, seed=seed)
        queries = one.c1 @ one.w
        logits = queries @ one.c2.t()
        exact = torch.softmax(logits, -1)
        u, v = softmax_factors(queries, one.c2, degree)
        bound = softmax_error_bound(float(logits.abs().max()), degree)
        assert_at_most((u @ v.t() - exact).abs(), bound * exact)
        assert_close((u @ v.t()).sum(-1), torch.ones(LENGTH, dtype=torch.float64))
    assert softmax_error_bound(10.0, 2) == math.inf
