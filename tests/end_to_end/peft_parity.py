"""One PEFT checkpoint through lorac: eager in every mode, there and back, and in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

import lorac
from lorac.formats import load_adapter, save_adapter
from tests import parity, peft_files
from tests.end_to_end.peft_cases import Case, checkpoint, example, joined, shapes
from tests.formats.oracle import assert_equal

EMITTED = ("live", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("fused", "baked")))
"""Modes in ONNX Runtime: how a weight is merged does not depend on the method, so the rest waits for the long run."""


@torch.no_grad()
def assert_eager(case: Case, folder: Path, dtype: torch.dtype = torch.float64) -> None:
    """lorac computes what PEFT does, in every mode of the case."""
    model, oracle = checkpoint(case, folder, dtype)
    calls = shapes(case.model, dtype)
    reference, base = ([host(**inputs) for inputs in calls] for host in (oracle, model))
    for mode in case.modes:
        compiled = lorac.compile(model, {"a": folder}, mode=mode)
        answers = [compiled(**inputs) for inputs in calls]
        parity.assert_parity(*(joined(outputs, case.compared) for outputs in (answers, reference, base)))


@torch.no_grad()
def assert_back(case: Case, folder: Path, dtype: torch.dtype = torch.float64, *, alone: bool = True) -> None:
    """What lorac saves of a checkpoint, PEFT loads and computes the same with.

    Args:
        case: The checkpoint.
        folder: Where to write.
        dtype: Of the model.
        alone: It can be read and written without its model, too.
    """
    model, oracle = checkpoint(case, folder / "first", dtype)
    adapter = load_adapter(folder / "first", model)
    save_adapter(adapter, folder / "second", model=model)
    assert_peft_says_the_same(case, model, oracle, folder / "second", dtype)
    assert_equal(load_adapter(folder / "second", model), adapter)
    if alone:
        save_adapter(load_adapter(folder / "first"), folder / "third")
        assert_equal(load_adapter(folder / "third", model), adapter)
        assert_peft_says_the_same(case, model, oracle, folder / "third", dtype)


@torch.no_grad()
def assert_peft_says_the_same(
    case: Case, model: nn.Module, oracle: PeftModel, folder: Path, dtype: torch.dtype
) -> None:
    """PEFT computes with the folder what the oracle does, bit for bit: the same tensors on the same code."""
    again, calls = peft_files.load_peft(model, folder), shapes(case.model, dtype)
    found, expected = (joined([host(**inputs) for inputs in calls], case.compared) for host in (again, oracle))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@torch.no_grad()
def assert_onnxruntime(case: Case, folder: Path, mode: str) -> None:
    """A compiled program in ONNX Runtime computes what PEFT does, in float32."""
    dtype = torch.float32
    model, oracle = checkpoint(case, folder, dtype)
    calls = shapes(case.model, dtype)
    compiled = lorac.compile(model, {"a": folder}, target="onnxruntime", mode=mode, **example(case.model))
    base = joined([model(**inputs) for inputs in calls], case.compared)
    reference = joined([oracle(**inputs) for inputs in calls], case.compared)
    own = None
    if mode != "baked":
        own = joined([compiled(**inputs, adapters=None) for inputs in calls], case.compared)
    answers = joined([compiled(**inputs) for inputs in calls], case.compared)
    parity.assert_parity(answers, reference, base, own_base=own)
