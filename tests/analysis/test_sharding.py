"""Shards together compute what one device does, and what adapters add to their traffic depends on the rank alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorac.analysis.sharding import run_sharded_mlp
from lorac.testing.eager_checks import assert_close


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_together_compute_what_one_computes(shards: int) -> None:
    generator = np.random.default_rng(shards)
    tokens, width, inner, rank = 5, 24, 40, 8
    x, W1, W2 = (generator.normal(size=shape) for shape in ((tokens, width), (inner, width), (width, inner)))
    A1, B1, A2, B2 = (
        generator.normal(size=shape) for shape in ((rank, width), (inner, rank), (rank, inner), (width, rank))
    )
    hidden = np.maximum(x @ (W1 + B1 @ A1).T, 0)
    found, sent = run_sharded_mlp(x, (W1, W2), ((A1, B1), (A2, B2)), shards)
    expected = hidden @ (W2 + B2 @ A2).T
    assert_close(torch.from_numpy(found), torch.from_numpy(expected))
    assert sent.base == 2 * (shards - 1) / shards * tokens * width
    assert sent.adapters == 3 * (shards - 1) / shards * tokens * rank, "what adapters add depends on the rank alone"
