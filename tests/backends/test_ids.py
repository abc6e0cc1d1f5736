"""Ids that an embedding does not have: ONNX Runtime takes −1 for the last one, and says the rest in its own words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import lorac
from tests.zoo import ZOO

ENTRY = ZOO["plain_mlp"]


@pytest.fixture(scope="module", params=[("up",), ("embed", "up")], ids=["embedding as it is", "adapted embedding"])
def compiled(request: pytest.FixtureRequest) -> lorac.Compiled:
    adapters = {"a": lorac.LoRA(r=2, targets=request.param)}
    return lorac.compile(ENTRY.fresh(), adapters, "onnxruntime", ENTRY.inputs(), self_test=False)


def _name_and_size() -> tuple[str, int]:
    (name,) = ENTRY.inputs()
    return name, lorac.sites(ENTRY.model())["embed"].in_features


@pytest.mark.medium("an embedding with an adapter", cases=["embedding as it is-*"])
@pytest.mark.parametrize("numpy", [False, True])
def test_rejects_ids_out_of_range(compiled: lorac.Compiled, numpy: bool, tmp_path: Path) -> None:
    name, size = _name_and_size()
    for wrong in (-1, size, 10**6):
        ids = ENTRY.inputs()[name].clone()
        ids[0, 1] = wrong
        with pytest.raises(lorac.ChoiceError, match=f"holds the id {wrong}; its embedding has the ids 0 to {size - 1}"):
            compiled(**{name: ids.numpy() if numpy else ids})
    compiled(**{name: torch.full((1, 5), size - 1)})


def test_an_artifact_knows_its_ids(compiled: lorac.Compiled, tmp_path: Path) -> None:
    name, _ = _name_and_size()
    compiled.save(tmp_path / "it")
    with pytest.raises(lorac.ChoiceError, match="holds the id -1"):
        lorac.load(tmp_path / "it")(**{name: torch.tensor([[-1, 2, 2, 2, 2]])})


def test_rejects_inputs_that_are_not_numeric(compiled: lorac.Compiled) -> None:
    name, _ = _name_and_size()
    for value in (np.array([["one", "two", "three", "four", "five"]]), "a text", [["one"]], [[1, 2], [3]]):
        with pytest.raises(lorac.ChoiceError, match="is not an array of numbers"):
            compiled(**{name: value})


def test_threads_and_providers_that_make_no_sense() -> None:
    for options, match in (
        ({"threads": 10**6}, "threads cannot be 1000000"),
        ({"threads": -1}, "threads cannot be -1"),
        ({"threads": "many"}, "takes no threads='many'"),
        ({"providers": ("Nowhere",)}, "no provider"),
        ({"providers": ()}, "providers= is empty"),
    ):
        with pytest.raises((lorac.OptionError, lorac.WrongType), match=match):
            lorac.compile(ENTRY.model(), target="onnxruntime", **options)
