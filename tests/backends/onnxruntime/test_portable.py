"""Programs whose slots every call gives: any runtime of ONNX switches them, with values from files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.numpy import load_file

import lorac
from lorac.backends.onnx.model_files import MODEL_FILE, NEUTRAL_FILE
from lorac.testing import assert_close
from tests.runtime.switching import CHOICES, MIXTURE, X, answer, build, pair, raw


@pytest.mark.medium("the live program", cases=["fused"])
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_portable_program_swaps_by_its_inputs(mode: str, tmp_path: Path) -> None:
    adapters = pair("dora", "shira")
    # The session below has ONNX Runtime's own ops alone; lorac-native's rounds otherwise.
    plain, made = (build(adapters, "onnxruntime", mode, portable=portable, native=False) for portable in (False, True))
    made.save(tmp_path / "it")
    loaded = lorac.load(tmp_path / "it", native=False)
    loaded.save_choice(tmp_path / "mixture.safetensors", MIXTURE)
    session = ort.InferenceSession(tmp_path / "it" / MODEL_FILE)
    neutral = load_file(tmp_path / "it" / NEUTRAL_FILE)
    assert not session.get_overridable_initializers()
    assert {value.name for value in session.get_inputs()} == {*neutral, "tokens"}
    for choice in CHOICES:
        expected = answer(plain, adapters=choice)
        assert raw(answer(made, adapters=choice)) == raw(answer(loaded, adapters=choice)) == raw(expected)
        file = {"a": "it/adapters/a.slots.safetensors", "b": "it/adapters/b.slots.safetensors"}.get(str(choice))
        own = load_file(tmp_path / (file or "mixture.safetensors")) if choice else {}
        assert own.keys() <= neutral.keys()
        (found,) = session.run(None, {**neutral, **own, "tokens": np.asarray(X)})
        assert raw(torch.from_numpy(found)) == raw(expected)
    assert len({raw(answer(made, adapters=choice)) for choice in CHOICES}) == len(CHOICES)


@pytest.mark.medium("runtime/test_settle.py, and the live program")
def test_weights_settle_where_slots_have_no_defaults() -> None:
    made = build(pair("lora", "hydra"), "onnxruntime", "fused", portable=True)
    made.swap("a")
    bound = answer(made)
    assert made.swap("a", settle=True).state == "settled"
    assert_close(answer(made), bound)


@pytest.mark.medium("portable programs of live adapters")
def test_a_baked_program_has_no_slots_to_give(tmp_path: Path) -> None:
    build(pair("lora", "hydra"), "onnxruntime", "baked", portable=True, active="a").save(tmp_path / "it")
    assert not (tmp_path / "it" / NEUTRAL_FILE).exists()
    assert [v.name for v in ort.InferenceSession(tmp_path / "it" / MODEL_FILE).get_inputs()] == ["tokens"]
