"""The deciding measure must be able to fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorac.testing import parity
from tests.parity import assert_parity

BASE = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4)
MOVE = 0.2 * torch.linspace(2, -1, 12, dtype=torch.float64).reshape(3, 4)


def test_exact_and_rounded_pass() -> None:
    assert assert_parity(BASE + MOVE, BASE + MOVE, BASE) == {"output": 0.0}
    rounded = (BASE + MOVE).float()
    ratios = assert_parity({"y": rounded.numpy()}, {"y": rounded}, {"y": BASE.float()})
    assert ratios == {"y": 0.0}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (BASE, "off by"),
        (BASE + 1.001 * MOVE, "off by"),
        ((BASE + MOVE).float(), "off by"),
        (torch.full_like(BASE, float("nan")), "off by"),
        ((BASE + MOVE)[:1], "torch.Size"),
    ],
)
def test_wrong_outputs_fail(wrong: Tensor, why: str) -> None:
    with pytest.raises(AssertionError, match=why):
        assert_parity(wrong, BASE + MOVE, BASE)


@pytest.mark.parametrize("scale", [0.0, 0.01, 10.0])
def test_an_adapter_that_decides_nothing_fails(scale: float) -> None:
    with pytest.raises(AssertionError, match="decides nothing"):
        assert_parity(BASE + scale * MOVE, BASE + scale * MOVE, BASE)


def test_missing_outputs_fail() -> None:
    ref = {"a": BASE + MOVE, "b": BASE + MOVE}
    with pytest.raises(AssertionError, match="outputs"):
        assert_parity({"a": BASE + MOVE}, ref, {"a": BASE, "b": BASE})


def test_a_base_that_rounds_differently_allows_four_times_its_ratio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, ref = BASE.float(), (BASE + MOVE).float()
    own, near, far = base * (1 + 1e-3), ref * (1 + 2e-3), ref * (1 + 2e-2)
    with pytest.raises(AssertionError, match="off by"):
        assert_parity(near, ref, base)
    said = list[str]()
    monkeypatch.setattr(parity.LOGGER, "info", lambda text, *given: said.append(text % given))
    assert_parity(near, ref, base, own_base=own)
    assert "parity of output" in said[0]
    with pytest.raises(AssertionError, match="off by"):
        assert_parity(far, ref, base, own_base=own)
    with pytest.raises(AssertionError, match="off by"):  # never in float64
        assert_parity(near.double(), ref.double(), base.double(), own_base=own.double())
