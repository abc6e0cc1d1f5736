"""The limits that tests decide by where there is no contribution to measure an error against.

What a test may use: ``torch.equal``; ``assert_parity`` (an output, against the adapter's own contribution);
``assert_close`` (two computations of one thing, which differ by rounding alone); and these. Each limit stands here
once, with the reason for its size, so that no test picks one that it passes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lorac.limits import ReadBudget
from lorac.testing.parity import ROUNDING

SWAP_SECONDS = 0.002
"""A swap of a small model's slots binds tensors and computes nothing."""
ROWS = {torch.float32: 1e-5, torch.float64: 1e-12}
"""The largest difference of a row of a batch from the same row alone, of its largest value: both sum in another order,
and a fault shows in the size of an adapter's contribution."""
LEAST_DIFFERENCE = 1e-3
"""Two things that are to differ do so by this share of their size at least: a hundred times what float32 rounds off
over a whole model, so that no rounding passes for a difference."""
STANDARD_ERRORS = 5
"""How far a statistic of a sample may be from its expectation: one sound sample in two million is farther."""
NULL = 1e-10
"""Singular values below this share of the largest are rounding (float64): a rank is the number of the others."""
FIRST_ORDER = 1e-2
"""What the terms of second order may add to a small step's effect, as a share of it."""
SKETCHED = 1e-4
"""How far the best approximation of low rank may be from what a sketch of the matrix finds, as a share of its size: the
power iterations leave (σₖ₊₁/σₖ) to a high power, not 0."""
PROJECTED = 1e-2
"""How much the error of a projection on random columns may exceed the smallest error of its rank, as a share of it,
where singular values hardly fall."""
TRAINED = 1e-3
"""How far a trained float32 tensor may be from the reference's, as a share of what training changed: AdamW divides by
the size of a gradient, and so makes of a rounding in a small one a step that shows."""
CURVE = 1e-5
"""How far two float32 training curves may be apart, relative to the loss: roundings of a step, which later steps carry
on and which the mean over a batch evens out."""
LOSSES = 1e-6
"""How far the losses of the first twenty steps may be from TRL's with PEFT's LoRA: float32 rounds off a tenth of it."""
BFLOAT16 = 2.0
"""How far a model's outputs in bfloat16 may be from float32's, as a multiple of how far those of torch's own bfloat16
model are: both round every product, and where one rounds twice as often it is off by twice as much."""
NEAR_TIE = 1e-3
"""Below this distance between the two likeliest tokens' logits their order is rounding (float32, a whole model)."""
NATIVE = 1e-6
"""How far the native op may be from ONNX Runtime's own ops, as a share of what adapters add (float32): sums of the same
numbers in another order."""
NATIVE_HALF = 1e-3
"""How far float16 factors may move what adapters add, as a share of it: each is rounded by up to 2^-11."""
READING = 1.5
"""Processor time that reading a file may take beyond the budget that is set for it, in seconds: the last step is not
interrupted, and the first load of anything imports."""


@contextlib.contextmanager
def within_budget() -> Iterator[None]:
    """Assert that what the block does with one file stays within the budget for one file, as it is at first."""
    begun = time.thread_time()
    yield
    taken = time.thread_time() - begun
    assert taken <= ReadBudget().seconds + READING, f"it took {taken:.1f} s"


def assert_apart(found: Tensor, other: Tensor) -> None:
    """Assert that two tensors differ by more than any rounding."""
    share = _norm(found - other) / _norm(other)
    assert share > LEAST_DIFFERENCE, f"they differ by {share:.1e} of their size, which may be rounding"


def assert_vanishes(found: Tensor, beside: Tensor) -> None:
    """Assert that a tensor is 0 up to what rounds off in computing with another."""
    share = _norm(found) / _norm(beside)
    assert share <= ROUNDING[beside.dtype], f"{share:.1e} of its size is left"


def assert_at_most(found: Tensor, bound: Tensor) -> None:
    """Assert that no value exceeds its bound, which is above 0, by more than rounding."""
    assert bool((found <= bound * (1 + ROUNDING[found.dtype])).all()), f"{found} exceeds {bound}"


def assert_sketched(found: Tensor, best: Tensor) -> None:
    """Assert that an approximation found by a sketch is as good as the best of its rank."""
    share = _norm(found - best) / _norm(best)
    assert share <= SKETCHED, f"off by {share:.1e} of its size"


def assert_mean(draws: Tensor, expected: float, places: int) -> None:
    """Assert that draws have this mean, which a page prints to so many places, as nearly as their spread tells."""
    allowed = STANDARD_ERRORS * float(draws.std()) / len(draws) ** 0.5 + 0.5 * 10.0**-places
    assert abs(float(draws.mean()) - expected) <= allowed, f"a mean of {float(draws.mean())}, not of {expected}"


def assert_same_text(found: Tensor, wanted: Tensor, logits: Tensor) -> int:
    """Assert that texts are the wanted ones, each up to where the reference's own choice is nearly a tie.

    Returns how many tokens that were.

    Args:
        found: token ids (rows, steps).
        wanted: the reference's.
        logits: (rows, steps, vocabulary): what the reference chose them by.
    """
    best = logits.topk(2).values
    # From a near tie on, either text is right, and what follows may be another.
    decided = (best[..., 0] - best[..., 1] >= NEAR_TIE).cumprod(1).bool()
    other = (decided & (found != wanted)).nonzero()
    assert not other.shape[0], f"row {other[0, 0]} is another from token {other[0, 1]} on"
    return int(decided.sum())


def assert_deviation(sample: Tensor, deviation: float) -> None:
    """Assert that independent normal numbers of mean 0 have this standard deviation, as nearly as their count tells."""
    allowed = STANDARD_ERRORS * deviation / (2 * sample.numel()) ** 0.5
    found = float(sample.detach().double().square().mean().sqrt())
    assert abs(found - deviation) <= allowed, f"a deviation of {found:.3g}, not of {deviation:.3g} ± {allowed:.1g}"


def rank_of(matrix: Tensor) -> int:
    """The rank of a float64 matrix."""
    return int(torch.linalg.matrix_rank(matrix, rtol=NULL))


def decimals(found: Tensor, places: int) -> list[float]:
    """Numbers as a page prints them, to compare with what it prints."""
    return [round(value, places) for value in found.detach().flatten().tolist()]


def assert_curve(losses: Sequence[float], expected: Sequence[float]) -> None:
    """Assert that two float32 trainings went the same way."""
    assert len(losses) == len(expected)
    for step, (loss, wanted) in enumerate(zip(losses, expected, strict=True)):
        assert abs(loss - wanted) <= CURVE * abs(wanted), f"step {step}: {loss}, not {wanted}"


def assert_trained(found: Tensor, expected: Tensor, start: Tensor) -> None:
    """Assert that training took a float32 tensor from ``start`` to where it took the reference's."""
    share = _norm(found - expected) / _norm(expected - start)
    assert share <= TRAINED, f"off by {share:.1e} of what training changed"


def _norm(value: Tensor) -> float:
    return float(torch.linalg.vector_norm(value.detach()))
