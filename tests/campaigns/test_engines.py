"""The adapters that the campaign of engines converts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorac
from campaigns import sound
from campaigns.engines.__main__ import CONVOLUTIONS, FAMILIES, TARGETS, fit
from campaigns.engines.contribution import contributing
from lorac.testing.parity import CONTRIBUTION
from lorac.variants.base import Variant

X = torch.linspace(-1, 1, 12).reshape(2, 6)


@pytest.mark.parametrize("power", [1, 8], ids=["even", "steep"])
def test_finds_an_adapter_that_moves_the_output_by_enough(power: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    plain = model(X).detach()
    variant = lorac.LoRA(r=2, targets=["0"])

    adapter, base, given = contributing(model, variant, lambda call: 1 + (9 * (call(X) - plain)) ** power)

    assert CONTRIBUTION[0] < torch.dist(base, given) / base.norm() < CONTRIBUTION[1]
    assert torch.equal(1 + (9 * (lorac.compile(model, {"one": adapter})(X) - plain)) ** power, given)


def test_rejects_a_method_that_moves_nothing() -> None:
    with pytest.raises(AssertionError, match=r"lora moves the output by 0\.0%"):
        contributing(nn.Sequential(nn.Linear(6, 6)), lorac.LoRA(r=2, targets=["0"]), lambda call: call(X) * 0 + 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_gives_a_method_targets_of_its_kinds(family: str) -> None:
    def targets(key: str) -> list[str]:
        variant: Any = fit(sound.configured(key)[0], family)
        parts: tuple[Variant, ...] = variant.parts if key == "union" else (variant,)
        return [*parts[0].targets]

    assert targets("trainable_tokens") == (["word_embeddings"] if family == "bert" else ["embed_tokens"])
    assert targets("ln_tuning") == (["LayerNorm"] if family == "bert" else ["norm"])
    assert targets("lora") == targets("union") == TARGETS[family] + CONVOLUTIONS.get(family, [])
    assert targets("chain") == TARGETS[family], "a part of it is for matrices"
