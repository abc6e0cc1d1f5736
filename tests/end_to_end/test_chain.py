"""Two adapters of a type that PEFT applies one on top of the other are PEFT's when they are joined by ``Chain``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig

import lorac
from tests import parity, peft_files
from tests.end_to_end.peft_cases import Case, checkpoint, joined, shapes
from tests.formats.oracle import assert_equal
from tests.refusing import refuses
from tests.zoo import ZOO

FIRST = Case("first", "tiny_llama", MissConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights="bat"))
SECOND = Case("second", "tiny_llama", MissConfig(r=8, target_modules=["down_proj", "v_proj"], init_weights="bat"))


@pytest.mark.medium("there", cases=["back"])
@torch.no_grad()
@pytest.mark.parametrize("order", [(FIRST, SECOND), (SECOND, FIRST)], ids=["there", "back"])
def test_two_bats(order: tuple[Case, Case], tmp_path: Path) -> None:
    dtype = torch.float64
    for seed, case in enumerate(order):
        model, _ = checkpoint(case, tmp_path / case.name, dtype, seed=seed, contribution=0.2)
    one, two = (tmp_path / case.name for case in order)
    oracle: Any = peft_files.load_peft(model, one)
    oracle.load_adapter(str(two), "second")
    oracle.base_model.set_adapter(["default", "second"])
    calls = shapes(FIRST.model, dtype)
    reference, base = (joined([host(**inputs) for inputs in calls], ("logits",)) for host in (oracle.eval(), model))

    adapters = [lorac.load_adapter(folder, model) for folder in (one, two)]
    chained = lorac.Chain.of(*adapters, name="both")
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"both": chained}, mode=mode)
        parity.assert_parity(joined([compiled(**inputs) for inputs in calls], ("logits",)), reference, base)
    summed = lorac.compile(model, dict(zip("ab", adapters, strict=True)), active={"a": 1.0, "b": 1.0})
    with pytest.raises(AssertionError):
        parity.assert_parity(joined([summed(**inputs) for inputs in calls], ("logits",)), reference, base)
    lorac.save_adapter(chained, tmp_path / "both.safetensors", format="native", model=model)
    assert_equal(lorac.load_adapter(tmp_path / "both.safetensors", model), chained)


@pytest.mark.medium("eager, and the kit's dense changes on ONNX Runtime")
@torch.no_grad()
def test_two_bats_in_onnxruntime(tmp_path: Path) -> None:
    for case in (FIRST, SECOND):
        model, _ = checkpoint(case, tmp_path / case.name, torch.float32)
    chained = lorac.Chain.of(*(lorac.load_adapter(tmp_path / n, model) for n in ("first", "second")), name="both")
    inputs, eager = ZOO[FIRST.model].inputs(), lorac.compile(model, {"both": chained})
    emitted = lorac.compile(model, {"both": chained}, target="onnxruntime")
    parity.assert_parity(emitted(**inputs), eager(**inputs), model(**inputs))
    with refuses("unsupported_field", match="PEFT has no type for 'chain'"):
        lorac.save_adapter(chained, tmp_path / "x", format="peft", model=model)
