"""How far below √ln L must queries and keys stay for the gradient of attention to be had in almost linear time?

    python -m experiments.computational_limits [--seeds 5] [--steps 100] [--smoke]

The gradient of one head of width 3 by chained low-rank factors of softmax, against the exact one; entries of queries
and keys are drawn evenly up to Γ. Errors are log10 of the largest of an entry, over the largest entry. The bound is
that of Taylor's remainder, for the entries of softmax. Times are of one core, the least of three. The norms are those
of a small Llama's heads on text, by LoRA of rank 8 on queries and values that has learned code at alpha = 8, when alpha
is then raised: the largest over heads of queries and keys, over √ln L.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor

import lorac
from experiments._chained_attention import (
    AttentionHead,
    chained_gradient,
    exact_gradient,
    softmax_error_bound,
    softmax_factors,
)
from experiments._char_lm import adapt, host, pieces
from experiments._finding import Expected, Finding, Table
from experiments._reader import tasks
from experiments._study import Experiment, Fault, main
from lorac.analysis.attention_norms import measure_attention

WIDTH, DEGREES, SIZES, LENGTHS, LONG = 3, (2, 4, 6), (0.25, 0.5, 1.0, 2.0, 4.0), (64, 256, 1024), (512, 1024, 2048)
ALPHAS, RATE = (8, 32, 128), 0.01
BOUNDED = 0.5
"""Γ up to which the bound is finite at every degree."""
CLOSED, SOFTMAX, TIMES = "closed form", "error of softmax, L = 64", "time of a gradient"
GROWTH, NORMS = f"growth of time, L = {LONG[0]} to {LONG[-1]}", "norms of a Llama over √ln L"


def error_table(length: int) -> str:
    """Return the title of a table of errors."""
    return f"error of the gradient, L = {length}"


def case(size: float, degree: int) -> str:
    """Return the name of a side."""
    return f"Γ = {size:g}, degree {degree}"


def head(length: int, size: float, seed: int) -> AttentionHead:
    """Return a head whose queries and keys have entries up to a size."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1

    w = torch.eye(WIDTH, dtype=torch.float64) + 0.2 * drawn(WIDTH, WIDTH)
    queries, keys = (size * drawn(length, WIDTH) for _ in range(2))
    return AttentionHead(queries @ torch.linalg.inv(w), keys, drawn(length, WIDTH), drawn(length, WIDTH), w)


def off(found: Tensor, exact: Tensor) -> float:
    """Return the largest error of an entry, over the largest entry."""
    return float((found - exact).abs().max() / exact.abs().max())


def closed_form_error(seed: int) -> float:
    """Return how far the closed form is from autograd."""
    one = head(64, 1.0, seed)
    w = one.w.clone().requires_grad_()
    loss = (torch.softmax(one.c1 @ w @ one.c2.t(), -1) @ one.c3 - one.y).square().sum() / 2
    (exact,) = torch.autograd.grad(loss, w)
    return off(exact_gradient(one), exact)


def softmax_error(size: float, degree: int, seed: int) -> float:
    """Return the largest error of an entry of softmax as a share of its bound, at L = 64."""
    one = head(64, size, seed)
    logits = one.c1 @ one.w @ one.c2.t()
    exact, (u, v) = torch.softmax(logits, -1), softmax_factors(one.c1 @ one.w, one.c2, degree)
    return float(((u @ v.t() - exact) / exact).abs().max()) / softmax_error_bound(float(logits.abs().max()), degree)


def seconds(gradient: Callable[[AttentionHead], Tensor], length: int, seed: int) -> float:
    """Return the least processor time of three."""
    one, taken = head(length, 0.5, seed), []
    for _ in range(3):
        begun = time.process_time()
        gradient(one)
        taken.append(time.process_time() - begun)
    return min(taken)


def ratios(seed: int, steps: int) -> dict[str, float]:
    """Return the largest norms over the threshold of the base, and with the adapter at each alpha."""
    base = host(0, min(500, 5 * steps))
    compiled, _ = adapt(base, lorac.LoRA(r=8, alpha=ALPHAS[0], targets=("q_proj", "v_proj")), RATE, seed, steps)
    learned, inputs = (
        compiled.adapters["a"],
        {"input_ids": pieces(tasks()[1].text, 4, torch.Generator().manual_seed(seed), 128)},
    )
    adapters: dict[str, lorac.Adapter | None] = {"base": None}
    for alpha in ALPHAS:
        adapters[f"alpha = {alpha}"] = replace(learned, variant=replace(learned.variant, alpha=alpha))
    found = {name: measure_attention(base, inputs, adapter) for name, adapter in adapters.items()}
    return {name: max(one.ratio for heads in norms.values() for one in heads) for name, norms in found.items()}


def find(given: argparse.Namespace) -> Finding:
    """Return errors, times and norms."""
    seeds, cases = range(given.seeds), [(size, degree) for size in SIZES for degree in DEGREES]

    def error(length: int, size: float, degree: int, seed: int) -> float:
        one = head(length, size, seed)
        return math.log10(off(chained_gradient(one, degree), exact_gradient(one)))

    errors = [
        Table(
            error_table(length),
            f"log10; √ln L = {math.sqrt(math.log(length)):.2f}",
            {case(*one): [error(length, *one, seed) for seed in seeds] for one in cases},
        )
        for length in LENGTHS
    ]
    bounded = [(size, degree) for size, degree in cases if size <= BOUNDED]
    shares = {case(*one): [softmax_error(*one, seed) for seed in seeds] for one in bounded}
    ways = {"exact": exact_gradient, "chained": lambda one: chained_gradient(one, 4)}
    times = {
        f"{name}, L = {length}": [seconds(way, length, seed) for seed in seeds]
        for length in (LONG if not given.smoke else [LONG[0], LONG[-1]])
        for name, way in ways.items()
    }
    norms = [ratios(seed, given.steps) for seed in seeds]
    return Finding(
        [
            Table(CLOSED, "error against autograd's gradient", {"closed form": [closed_form_error(s) for s in seeds]}),
            *errors,
            Table(SOFTMAX, "largest error of an entry over its bound", shares),
            Table(TIMES, "seconds", times),
            Table(GROWTH, "times longer", {name: _growth(times, name) for name in ways}),
            Table(NORMS, "largest of a head", {name: [one[name] for one in norms] for name in norms[0]}),
        ],
        EXPECTED,
    )


def _growth(times: Mapping[str, Sequence[float]], name: str) -> list[float]:
    """Return how many times longer the longest sequence takes than the shortest, seed by seed."""
    short, long = (times[f"{name}, L = {length}"] for length in (LONG[0], LONG[-1]))
    return [more / less for more, less in zip(long, short, strict=True)]


def undivided_features(x: Tensor, degree: int) -> Tensor:
    """Return the monomials of rows up to a degree, not divided by the roots of their factorials."""
    places = range(x.shape[-1])
    chosen = [one for size in range(degree + 1) for one in itertools.combinations_with_replacement(places, size)]
    return torch.stack([x[:, list(one)].prod(-1) for one in chosen], dim=-1)


EXPECTED = [
    Expected(CLOSED, "closed form", 1e-12),
    *(
        Expected(error_table(length), case(size, more), case(size, less), "theorem 4.1")
        for length in LENGTHS
        for size in SIZES[:3]
        for less, more in itertools.pairwise(DEGREES)
    ),
    *(Expected(error_table(length), -1.0, case(SIZES[-1], DEGREES[-1])) for length in LENGTHS),
    *(Expected(SOFTMAX, case(size, degree), 1.0) for size in SIZES if size <= BOUNDED for degree in DEGREES),
    Expected(TIMES, f"chained, L = {LONG[-1]}", f"exact, L = {LONG[-1]}", "theorem 4.1"),
    Expected(GROWTH, "chained", "exact", "theorem 4.1"),
    *(Expected(NORMS, *pair) for pair in itertools.pairwise(["base", *(f"alpha = {one}" for one in ALPHAS)])),
]
EXPERIMENT = Experiment(
    claim="Below √ln L the gradient of attention is had in almost linear time, by low-rank factors whose error falls "
    "with their degree; above it is not, and LoRA's scale drives norms there.",
    source="Hu et al., Computational Limits of LoRA, arXiv 2406.03136, theorems 3.1 and 4.1",
    find=find,
    steps=100,
    fails_by="factors whose error stays or whose time grows as that of the exact gradient",
    fault=Fault(
        "monomials are not divided by the roots of their factorials",
        lambda: patch("experiments._chained_attention.polynomial_features", undivided_features),
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT, "computational_limits", __doc__)
