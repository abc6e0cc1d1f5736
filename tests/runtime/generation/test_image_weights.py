"""Images in prompts of models with quantised weights: the answers of the values that the programs store."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from tests.image_models import FAMILIES, batch, made, opposite
from tests.limits import LEAST_DIFFERENCE
from tests.runtime.generation.stored_values import compile_quantised
from tests.runtime.generation.test_hybrids import NEAR
from tests.runtime.generation.test_prompt_features import LOGITS, OPTIONS, _expect

FEW = ["int4-llava", "int8-qwen3_vl", "int4-gemma3"]


@pytest.mark.medium("test_quantised.py: other models; test_prompt_features.py: float weights", cases=FEW)
@pytest.mark.slow("other families of test_prompt_features.py", keep=FEW)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_weights_answer_as_the_values_that_they_store(
    weights: str, family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    peft, given = made(family), batch(family)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "forward reads 'image_grid_thw' as numbers", lorac.LoracWarning)
        compiled = compile_quantised(peft, monkeypatch, weights=weights, example_inputs=batch(family, (3, 3), seed=7))
    compiled.save(tmp_path / "saved")
    adapters: list[str | None] = ["one", "two", None]
    width = given["input_ids"].shape[1]
    for engine in (compiled, lorac.load(tmp_path / "saved")):
        found = engine.generate(**given, adapters=adapters, **OPTIONS, **LOGITS)
        for row, adapter in enumerate(adapters):
            tokens, expected = _expect(peft, family, row, adapter, **LOGITS)
            assert torch.equal(found.sequences[row, width:][: len(tokens)], tokens)
            for scores, others in zip(found.logits, expected.logits, strict=True):
                assert (scores[row] - others[0]).abs().max() <= NEAR * (others.max() - others.min())
    beams = compiled.generate(**given, adapters="two", **OPTIONS, num_beams=3)
    for row in range(3):
        tokens, _ = _expect(peft, family, row, "two", num_beams=3)
        assert torch.equal(beams.sequences[row, width:][: len(tokens)], tokens)
    first: Any = compiled.generate(**given, adapters="one", **OPTIONS, **LOGITS).logits[0]
    other = compiled.generate(**opposite(family), adapters="one", **OPTIONS, **LOGITS).logits[0]
    assert (other - first).abs().max() > LEAST_DIFFERENCE * first.abs().max()
