"""How a compiled model is called: as its host, in the host's order, with torch or numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lorac
from lorac import ChoiceError, ExampleInputsNeeded, InputMismatch
from lorac.testing import assert_close
from tests import parity
from tests.end_to_end.peft_cases import CASES, checkpoint, example
from tests.zoo import ZOO

TEXT = {case.model: case for case in CASES if case.name == "lora"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """BERT compiled from example inputs in another order than forward's; PEFT's model; the base."""
    folder = tmp_path_factory.mktemp("bert")
    model, oracle = checkpoint(TEXT["tiny_bert"], folder, torch.float32)
    inputs = dict(reversed(ZOO["tiny_bert"].inputs().items()))
    return lorac.compile(model, {"a": folder}, target="onnxruntime", example_inputs=inputs), oracle, model


def _check(answer: Any, oracle: Any, model: Any, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        parity.assert_parity(answer, oracle(**inputs), model(**inputs), own_base=model(**inputs))


def test_positional_arguments_have_the_hosts_order(bert: tuple[Any, Any, Any]) -> None:
    compiled, *hosts = bert
    inputs = ZOO["tiny_bert"].inputs()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    _check(compiled(ids, mask), *hosts, inputs)
    _check(compiled(ids, attention_mask=mask), *hosts, inputs)
    _check(compiled(ids, mask, None, position_ids=None), *hosts, inputs)


def test_returns_numpy_for_numpy(bert: tuple[Any, Any, Any]) -> None:
    compiled, *hosts = bert
    inputs = ZOO["tiny_bert"].inputs()
    answer = compiled(**{name: value.numpy() for name, value in inputs.items()})
    assert isinstance(answer["logits"], np.ndarray)
    _check(answer, *hosts, inputs)
    assert isinstance(compiled(**inputs)["logits"], Tensor)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_of_any_width(bert: tuple[Any, Any, Any], dtype: torch.dtype) -> None:
    compiled, *hosts = bert
    inputs = ZOO["tiny_bert"].inputs()
    _check(compiled(inputs["input_ids"].to(dtype), inputs["attention_mask"].bool()), *hosts, inputs)


def test_fills_a_missing_mask_with_ones(bert: tuple[Any, Any, Any]) -> None:
    compiled, *hosts = bert
    ids = ZOO["tiny_bert"].inputs()["input_ids"]
    _check(compiled(ids), *hosts, {"input_ids": ids})
    _check(compiled(input_ids=ids.numpy()), *hosts, {"input_ids": ids})


def test_padding_changes_nothing_that_is_not_padded(bert: tuple[Any, Any, Any]) -> None:
    compiled, *_ = bert
    ids = ZOO["tiny_bert"].inputs(length=7)["input_ids"]
    padded, mask = torch.nn.functional.pad(ids, (0, 4)), torch.nn.functional.pad(torch.ones_like(ids), (0, 4))
    with torch.no_grad():
        assert_close(compiled(padded, mask)["logits"], compiled(ids)["logits"])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"labels": torch.tensor([0, 1])}, ChoiceError, "no input 'labels'"),
        ({"atention_mask": torch.ones(2, 5)}, ChoiceError, "nearest: attention_mask"),
        ({"return_dict": 0.5}, InputMismatch, "captured with return_dict=True"),
        ({"output_hidden_states": True}, InputMismatch, "captured with output_hidden_states=False"),
    ],
)
def test_rejects_arguments_that_the_program_lacks(
    bert: tuple[Any, Any, Any], arguments: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        bert[0](**ZOO["tiny_bert"].inputs(), **arguments)


def test_accepts_options_that_equal_the_programs(bert: tuple[Any, Any, Any]) -> None:
    compiled, *hosts = bert
    inputs = ZOO["tiny_bert"].inputs()
    _check(compiled(**inputs, return_dict=True, output_hidden_states=False), *hosts, inputs)


def test_returns_a_tuple_without_return_dict(bert: tuple[Any, Any, Any]) -> None:
    compiled, *_ = bert
    inputs = ZOO["tiny_bert"].inputs()
    answer = compiled(**inputs, return_dict=False)
    assert type(answer) is tuple
    assert torch.equal(answer[0], compiled(**inputs)["logits"])


def test_rejects_duplicate_and_extra_arguments(bert: tuple[Any, Any, Any]) -> None:
    compiled, ids = bert[0], ZOO["tiny_bert"].inputs()["input_ids"]
    with pytest.raises(ChoiceError, match="'input_ids' is given twice"):
        compiled(ids, input_ids=ids)
    with pytest.raises(ChoiceError, match="30 positional arguments are too many"):
        compiled(*[ids] * 30)


@pytest.mark.medium("test_rejects_sizes_other_than_the_one_that_the_trace_fixed in test_fidelity.py")
def test_sizes_that_were_not_made_dynamic(tmp_path: Path) -> None:
    model, _ = checkpoint(TEXT["plain_mlp"], tmp_path, torch.float32)
    inputs = ZOO["plain_mlp"].inputs()
    compiled = lorac.compile(model, {"a": tmp_path}, target="onnxruntime", example_inputs=inputs)
    assert compiled(**ZOO["plain_mlp"].inputs(batch=1)).shape[0] == 1  # the batch always is
    with pytest.raises(InputMismatch, match=r"'tokens' has shape \[2, 9\].*captured for \[any, 5\]"):
        compiled(**ZOO["plain_mlp"].inputs(length=9))


@pytest.mark.medium("plain models", cases=["resnet18"])
@pytest.mark.parametrize("name", ["plain_mlp", "plain_conv", "resnet18"])
def test_a_plain_module_needs_example_inputs(name: str, tmp_path: Path) -> None:
    model, _ = checkpoint(TEXT[name], tmp_path, torch.float32)
    (argument,) = example(name)["example_inputs"]
    with pytest.raises(ExampleInputsNeeded, match=rf"forward takes \({argument}\)"):
        lorac.compile(model, {"a": tmp_path}, target="onnxruntime")
    assert lorac.compile(model, {"a": tmp_path}) is not None  # eager calls the host as it is
