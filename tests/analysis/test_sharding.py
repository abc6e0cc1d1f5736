"""Shards together equal one device, and the traffic of adapters depends only on the rank.

A block with adapters over several devices is simulated as S-LoRA shards it, arXiv 2311.03285, with what they send.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lorac.testing import assert_close

_Array = npt.NDArray[np.float64]


@dataclass
class _Communication:
    """Elements that each shard sends, of the base's products and of the adapters'."""

    base: float = 0.0
    adapters: float = 0.0


def _run_sharded_mlp(
    x: _Array, weights: tuple[_Array, _Array], pairs: tuple[tuple[_Array, _Array], tuple[_Array, _Array]], shards: int
) -> tuple[_Array, _Communication]:
    """Compute y = W₂ h(W₁ x) with a pair on both, sharded as S-LoRA does, and count what shards send.

    W₁ is split by outputs and W₂ by inputs. A₁ is split by rank, and x·A₁ gathered; B₁ is split by outputs. A₂ is split
    by inputs, and its product summed over the shards; B₂ is split by outputs, and added to the shard's own columns of
    the base's product before the one sum that the base needs anyway. h is the positive part.

    Args:
        x: (tokens, in).
        weights: W₁ (m, in) and W₂ (out, m).
        pairs: (A₁ (r, in), B₁ (m, r)) and (A₂ (r, m), B₂ (out, r)).
        shards: divides r, m and out.
    """
    (W1, W2), ((A1, B1), (A2, B2)) = weights, pairs
    sent, tokens = _Communication(), x.shape[0]
    gathered = np.concatenate([x @ part.T for part in np.split(A1, shards)], 1)
    sent.adapters += (shards - 1) / shards * tokens * A1.shape[0]
    hidden = [
        np.maximum(x @ base.T + gathered @ out.T, 0)
        for base, out in zip(np.split(W1, shards), np.split(B1, shards), strict=True)
    ]
    inner = sum(own @ part.T for own, part in zip(hidden, np.split(A2, shards, 1), strict=True))
    sent.adapters += 2 * (shards - 1) / shards * tokens * A2.shape[0]
    partial = [own @ part.T for own, part in zip(hidden, np.split(W2, shards, 1), strict=True)]
    columns = W2.shape[0] // shards
    for shard, part in enumerate(np.split(B2, shards)):
        partial[shard][:, shard * columns : (shard + 1) * columns] += inner @ part.T
    sent.base += 2 * (shards - 1) / shards * tokens * W2.shape[0]
    return np.sum(partial, 0), sent


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_add_up_to_the_whole_layer(shards: int) -> None:
    generator = np.random.default_rng(shards)
    tokens, width, inner, rank = 5, 24, 40, 8
    x, W1, W2 = (generator.normal(size=shape) for shape in ((tokens, width), (inner, width), (width, inner)))
    A1, B1, A2, B2 = (
        generator.normal(size=shape) for shape in ((rank, width), (inner, rank), (rank, inner), (width, rank))
    )
    hidden = np.maximum(x @ (W1 + B1 @ A1).T, 0)
    found, sent = _run_sharded_mlp(x, (W1, W2), ((A1, B1), (A2, B2)), shards)
    expected = hidden @ (W2 + B2 @ A2).T
    assert_close(torch.from_numpy(found), torch.from_numpy(expected))
    assert sent.base == 2 * (shards - 1) / shards * tokens * width
    assert sent.adapters == 3 * (shards - 1) / shards * tokens * rank, "what adapters add depends on the rank alone"
