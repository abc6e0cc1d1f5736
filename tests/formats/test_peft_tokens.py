"""Rows of an embedding that PEFT trains by themselves, read and written, against PEFT's outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import lorac
from lorac import AdapterError, BaseNeeded, FormatError, LoracError, SiteError, load_adapter, save_adapter
from tests import parity
from tests.end_to_end.peft_cases import tie
from tests.peft_files import change_tensors, configure, load_peft, make_peft
from tests.refusing import refuses
from tests.zoo import ZOO

LLAMA = ZOO["tiny_llama"]
ROWS = [0, 1, 5, 17, 42, 99]
EMBEDDED = "model.embed_tokens"
KEY = f"model.{EMBEDDED}.token_adapter.trainable_tokens_delta"
APART = {"embed_tokens": ROWS, "lm_head": [2, 3, 101]}


def made(folder: Path, model: nn.Module, rows: Any, **settings: Any) -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=rows, **settings)
    inputs = LLAMA.inputs()
    inputs["input_ids"] = torch.tensor([[0, 5, 99, 7, 42], [17, 3, 1, 5, 8]])
    oracle = make_peft(model, folder, config, inputs=inputs, outputs=["logits"], contribution=0.15)
    return oracle, inputs


@pytest.mark.medium("one table that two names have", keep=["list-tied"])
@pytest.mark.parametrize(
    ("rows", "tied"),
    [
        pytest.param(ROWS, False, id="list-free"),
        pytest.param(ROWS, True, id="list-tied"),
        pytest.param(APART, True, id="apart-tied"),
        pytest.param(APART, False, id="apart-free", marks=pytest.mark.slow),
        pytest.param({"embed_tokens": ROWS}, True, id="named-tied", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_matches_peft(rows: Any, tied: bool, tmp_path: Path) -> None:
    model = LLAMA.fresh()
    if tied:
        tie(model)
    oracle, inputs = made(tmp_path / "theirs", model, rows)
    expected, base = oracle(**inputs).logits, model(**inputs).logits
    for mode in ("live", "fused"):
        compiled = lorac.compile(model, {"a": tmp_path / "theirs"}, mode=mode)
        parity.assert_parity(compiled(**inputs).logits, expected, base)
    read = load_adapter(tmp_path / "theirs", model)
    if tied and rows is APART:
        with refuses("unsupported_field", match="are one tensor in the model, by two"):
            save_adapter(read, tmp_path / "back", model=model)
        return
    save_adapter(read, tmp_path / "back", model=model)
    assert torch.equal(load_peft(model, tmp_path / "back")(**inputs).logits, expected)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    made(folder, LLAMA.fresh(), ROWS)
    return folder


def test_the_other_rows_are_the_models(theirs: Path) -> None:
    with pytest.raises(BaseNeeded, match=f"rows of '{EMBEDDED}' alone"):
        load_adapter(theirs)
    model = LLAMA.fresh()
    weight = load_adapter(theirs, model).replaced[f"{EMBEDDED}.weight"]
    others = [row for row in range(len(weight)) if row not in ROWS]
    assert torch.equal(weight[others], model.get_parameter(f"{EMBEDDED}.weight")[others])


SPOILT: tuple[tuple[str, type[LoracError], dict[str, Any], dict[str, Any]], ...] = (
    ("for 5 tokens up to number 42", AdapterError, {"trainable_token_indices": ROWS[:-1]}, {}),
    ("up to number 128; its weight is", AdapterError, {"trainable_token_indices": [*ROWS[:-1], 128]}, {}),
    ("expected numbers of rows, each once", FormatError, {"trainable_token_indices": [1, 1]}, {}),
    ("expected numbers of rows, each once", FormatError, {"trainable_token_indices": {"embed_tokens": [-1]}}, {}),
    ("lacks the rows of 'lm_head'", FormatError, {"trainable_token_indices": APART}, {}),
    ("lacks the rows of 'the embedding'", FormatError, {}, {KEY: None}),
    ("accounts for 1 tensors", FormatError, {"trainable_token_indices": None}, {}),
    (
        "rows for 'model.other', which the model does not have",
        SiteError,
        {},
        {KEY: None, KEY.replace("embed_tokens", "other"): torch.zeros(6, 64)},
    ),
    (
        "trains rows of 'model.embed_tokens' and adapts it",
        FormatError,
        {},
        {
            f"model.{EMBEDDED}.lora_embedding_A": torch.zeros(2, 128),
            f"model.{EMBEDDED}.lora_embedding_B": torch.zeros(64, 2),
        },
    ),
)


@pytest.mark.parametrize(("match", "error", "fields", "tensors"), SPOILT, ids=lambda v: v if isinstance(v, str) else "")
def test_rejects_contradictory_fields_and_tensors(
    match: str, error: type[LoracError], fields: dict[str, Any], tensors: dict[str, Any], theirs: Path, tmp_path: Path
) -> None:
    for file in theirs.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    configure(tmp_path, **fields)
    change_tensors(tmp_path, tensors)
    with pytest.raises(error, match=match):
        load_adapter(tmp_path, LLAMA.model())


@torch.no_grad()
def test_rows_as_a_method_of_their_own(tmp_path: Path) -> None:
    """Fresh it is the base; tied layers are changed together in PEFT, which has no place for one of them alone."""
    free, inputs = LLAMA.fresh(), LLAMA.inputs()
    tokens = lorac.TrainableTokens(token_indices=ROWS, targets=("embed_tokens",))
    fresh = lorac.compile(free, {"a": tokens})
    assert torch.equal(fresh(**inputs).logits, free(**inputs).logits)
    save_adapter(fresh.adapters["a"], tmp_path / "free", model=free)
    tied = LLAMA.fresh()
    tie(tied)
    with refuses("unsupported_field", match=r"changes 'lm_head' with 'model\.embed_tokens', which it is tied to"):
        save_adapter(fresh.adapters["a"], tmp_path / "tied", model=tied)
    key = "model.lm_head.trainable_tokens_delta"
    change_tensors(tmp_path / "free", {key: torch.zeros(len(ROWS), 64)})
    with refuses("corrupt_file", match=r"other tensors for 'lm_head' than for 'model\.embed_tokens'"):
        load_adapter(tmp_path / "free", tied)
    change_tensors(tmp_path / "free", {key: None})
    configure(tmp_path / "free", token_indices=[1, 1, 2, 3, 4, 5])
    with refuses("unsupported_field", match="expected numbers of rows, each once"):
        load_adapter(tmp_path / "free", free)
