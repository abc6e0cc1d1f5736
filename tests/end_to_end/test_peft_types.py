"""Every PEFT type against PEFT's own outputs: in eager in every mode, there and back, and in ONNX Runtime."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorac.formats.peft.config import peft_types
from lorac.formats.peft.prompt_folder import PromptType
from tests.end_to_end.peft_cases import TEXT, Case
from tests.end_to_end.peft_parity import Checkpoint, assert_back, assert_eager, assert_onnxruntime
from tests.end_to_end.peft_types import CASES


def _first(cases: Iterable[Case]) -> list[Case]:
    """The first case of each type."""
    return [next(of) for _, of in itertools.groupby(cases, lambda case: case.kind)]


def _in_eager() -> Iterator[Any]:
    """All cases; those beyond the first of a type, on a plain model and on a transformer, wait for the long run."""
    transformers = [case for case in CASES if case.model in TEXT]
    plain = [case for case in CASES if case not in transformers]
    quick = [case for case in (*_first(plain), *_first(transformers)) if not case.late]
    for case in CASES:
        marks = () if case in quick else pytest.mark.slow
        yield pytest.param(case, id=f"{case.kind.lower()}-{case.id}", marks=marks)


def _in_onnxruntime() -> Iterator[Any]:
    """How a weight is merged does not depend on the method: all but one live program per type wait for the long run."""
    emitted = [case for case in CASES if case.emitted]
    for case, mode in ((one, mode) for one in emitted for mode in one.modes):
        marks = () if mode == "live" and case in _first(emitted) else pytest.mark.slow
        yield pytest.param(case, mode, id=f"{case.kind.lower()}-{case.id}-{mode}", marks=marks)


def test_every_type_has_cases() -> None:
    others = set(peft_types()) - {"LORA", "SHIRA", "XLORA", "POLY"}  # a call of POLY has tasks: test_peft_poly.py
    others -= {"ADAPTION_PROMPT"}  # of attentions alone: variants/test_adaption_prompt.py
    others -= {name for name, type_ in peft_types().items() if isinstance(type_, PromptType)}  # test_prompt_adapters.py
    for chosen in (CASES, [c for c in CASES if c.model in TEXT], [c for c in CASES if c.emitted]):
        assert {case.kind for case in chosen} == others


@pytest.mark.medium(
    "plain models, the kit's norms, and formats/test_peft_tokens.py has tied rows",
    cases=["ln_tuning-tiny_bert-norms", "oft-tiny_bert-exact", "trainable_tokens-tiny_llama-*"],
)
@pytest.mark.slow(
    "the same types on plain models",
    keep=[
        "oft-tiny_bert-exact",
        "trainable_tokens-tiny_llama-chosen-tied",
        "ln_tuning-tiny_bert-norms",
        "*-plain_mlp-*",
        "*-plain_conv-*",
        "*-resnet18-*",
    ],
)
@pytest.mark.parametrize("case", list(_in_eager()))
def test_matches_peft(case: Case, tmp_path: Path) -> None:
    made = Checkpoint.of(case, tmp_path / "own", case.dtype)
    assert_eager(made)
    if case.back:
        assert_back(made, tmp_path / "back")


@pytest.mark.medium("replaced rows", keep=["trainable_tokens-plain_mlp-rows-live"])
@pytest.mark.slow(
    "a type of each normal form",
    keep=[
        "oft-plain_mlp-series-live",
        "ia3-plain_mlp-both-live",
        "vera-plain_mlp-plain-live",
        "loha-plain_conv-effective-live",
        "trainable_tokens-plain_mlp-rows-live",
    ],
)
@pytest.mark.parametrize(("case", "mode"), list(_in_onnxruntime()))
def test_onnxruntime(case: Case, mode: str, tmp_path: Path) -> None:
    assert_onnxruntime(Checkpoint.of(case, tmp_path, torch.float32), mode)
