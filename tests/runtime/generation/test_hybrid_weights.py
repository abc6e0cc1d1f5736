"""Hybrids with quantised weights, whose answers are those of the weights that are stored; and behind virtual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.testing import assert_close
from tests.decoders import HYBRIDS
from tests.runtime.generation.prompted import CONFIGS, continued, logits, save_prompt
from tests.runtime.generation.stored_values import compile_quantised
from tests.runtime.generation.test_hybrids import LENGTHS, NEAR, _adapted, _keeps_states, _logits
from tests.runtime.generation.texts import padded, prompts

FEW = ["*bamba*", "*lfm2*"]
ROWS = prompts(lengths=LENGTHS)


@pytest.mark.medium("other weights of test_quantised.py, other states of test_hybrids.py", cases=FEW)
@pytest.mark.slow("other families of test_hybrids.py", keep=FEW)
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_quantised_weights_answer_as_the_values_that_they_store(
    family: str, weights: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    peft = _adapted(family, dora=False)
    compile_quantised(peft, monkeypatch, weights=weights).save(tmp_path / "stored")
    loaded = lorac.load(tmp_path / "stored")
    found, scores = _logits(loaded, padded(ROWS, "left"))
    for tokens, given, row in zip(found, scores, ROWS, strict=True):
        alone, expected = _logits(peft, padded([row], "left"), use_cache=_keeps_states(peft))
        assert torch.equal(tokens, alone[0])
        assert (given - expected[0]).abs().max() <= NEAR * (expected.max() - expected.min())
    mixed, _ = _logits(loaded, padded(ROWS, "left"), adapters=["default", None] * 2)
    assert torch.equal(mixed[::2], found[::2])


@pytest.mark.medium("test_prompt_adapters.py and test_hybrids.py", cases=FEW)
@pytest.mark.slow("other families of test_hybrids.py", keep=FEW)
@pytest.mark.parametrize("family", HYBRIDS)
def test_virtual_tokens_precede_hybrids(family: str, tmp_path: Path) -> None:
    host = HYBRIDS[family]().float()
    peft = save_prompt(host, CONFIGS["PROMPT_TUNING"](), tmp_path / "prompt")
    compiled = lorac.compile(
        host, {"prompt": tmp_path / "prompt"}, target="onnxruntime", cache=True, active=None, self_test=False
    )
    ids = ROWS[0][None]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = continued(peft, ids, 4, use_cache=False)
    both = compiled.generate(
        ids.repeat(2, 1), adapters=["prompt", None], output_logits=True, return_dict_in_generate=True, **options
    )
    assert torch.equal(both.sequences[:1], expected)
    scores = logits(peft, ids, use_cache=False)[:, -1]
    assert_close(both.logits[0][:1], scores)
    assert (both.logits[0][1:] - scores).abs().max() > NEAR * (scores.max() - scores.min())
    assert torch.equal(compiled.generate(ids, adapters="prompt", **options), expected)
