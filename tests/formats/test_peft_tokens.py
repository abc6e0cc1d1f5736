"""Rows of an embedding that PEFT trains by themselves, read and written, against PEFT's outputs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

import lorac
import lorac.training
from lorac import AdapterError, BaseNeeded, FormatError, LoracError, SiteError, load_adapter, save_adapter
from lorac.testing import assert_close
from tests import parity
from tests.end_to_end.peft_cases import tie
from tests.peft_files import change_tensors, configure, load_peft, make_peft, of_peft_0_21, quiet
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
    save_adapter(load_adapter(tmp_path / "theirs", model), tmp_path / "back", model=model)
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


@pytest.mark.parametrize("between", ["peft", "native"])
def test_writes_the_rows_that_were_read_and_no_others(between: str, theirs: Path, tmp_path: Path) -> None:
    model, name = LLAMA.fresh(), "adapter_model.safetensors"
    save_adapter(load_adapter(theirs, model), tmp_path / "between", format=between, model=model)
    save_adapter(load_adapter(tmp_path / "between", model), tmp_path / "back", model=model)
    read, written = load_file(theirs / name), load_file(tmp_path / "back" / name)
    assert written.keys() == read.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in read.items())
    assert written[f"base_model.{KEY}"].shape == (len(ROWS), model.config.hidden_size)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {EMBEDDED: ROWS}
    assert not config["modules_to_save"]


SPOILT: tuple[tuple[str, type[LoracError], dict[str, Any], dict[str, Any]], ...] = (
    ("for 5 tokens up to number 42", AdapterError, {"trainable_token_indices": ROWS[:-1]}, {}),
    ("up to number 128; its weight has shape", AdapterError, {"trainable_token_indices": [*ROWS[:-1], 128]}, {}),
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
    with refuses("unsupported_field", match=r"'lm_head' is tied to 'model\.embed_tokens'"):
        save_adapter(fresh.adapters["a"], tmp_path / "tied", model=tied)
    key = "model.lm_head.trainable_tokens_delta"
    change_tensors(tmp_path / "free", {key: torch.zeros(len(ROWS), 64)})
    with refuses("corrupt_file", match=r"different tensors for 'lm_head' and 'model\.embed_tokens'"):
        load_adapter(tmp_path / "free", tied)
    change_tensors(tmp_path / "free", {key: None})
    configure(tmp_path / "free", token_indices=[1, 1, 2, 3, 4, 5])
    with refuses("unsupported_field", match="expected numbers of rows, each once"):
        load_adapter(tmp_path / "free", free)


class Words(nn.Module):
    """An embedding, a layer and an output layer, under the names and methods that PEFT looks for."""

    def __init__(self, *, tied: bool, embedding: str = "emb") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = {"tie_word_embeddings": tied, "model_type": "words"}
        self._tied_weights_keys = {"lm_head.weight": f"{embedding}.weight"} if tied else {}
        self._embedding = embedding
        self.add_module(embedding, nn.Embedding(9, 6))
        self.up, self.lm_head = nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        if tied:
            self.lm_head.weight = self.get_input_embeddings().weight
        self.double()

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.lm_head(torch.tanh(self.up(self.get_input_embeddings()(words))))  # type: ignore[no-any-return]  # a layer's

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self._embedding)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


IDS = torch.tensor([[1, 3, 5, 7]])


def train(model: nn.Module) -> torch.Tensor:
    """Take four steps; return the losses."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.1), []
    for _ in range(4):
        loss = nn.functional.cross_entropy(model(IDS)[0], IDS[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def count_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def lora(rows: Any = None, targets: str = "up", **settings: Any) -> PeftConfig:
    return LoraConfig(r=2, target_modules=[targets], trainable_token_indices=rows, init_lora_weights=False, **settings)


TRAINED: dict[str, PeftConfig] = {
    "list": lora([1, 3]),
    "named": lora({"emb": [1, 3], "lm_head": [1, 3]}),
    "apart": lora({"emb": [1, 3], "lm_head": [2]}),
    "head": lora({"lm_head": [1, 3]}),
    "dora": lora([1, 3], use_dora=True, bias="lora_only"),
    "tokens": TrainableTokensConfig(target_modules=["emb"], token_indices=[1, 3]),
}


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=[of_peft_0_21] * (name == "dora")) for name in TRAINED])
def test_trains_the_same_tensors_as_peft(name: str, tied: bool, tmp_path: Path) -> None:
    """Files saved after training, with the model and without, hold rows again and mean the same to PEFT and lorac."""
    with quiet():
        theirs = get_peft_model(Words(tied=tied), copy.deepcopy(TRAINED[name]))
        theirs.save_pretrained(tmp_path / "theirs")
    ours = lorac.compile(Words(tied=tied), {"a": tmp_path / "theirs"}).train()
    assert count_trained(ours) == count_trained(theirs)
    assert_close(train(ours), train(theirs))
    expected = theirs(IDS).detach()
    for number, model in enumerate([Words(tied=tied), None]):
        save_adapter(ours.adapters["a"], tmp_path / f"{number}", model=model)
        assert_close(load_peft(Words(tied=tied), tmp_path / f"{number}")(IDS), expected)
    save_adapter(ours.adapters["a"], tmp_path / "native", format="native")
    again = lorac.compile(Words(tied=tied), {"a": tmp_path / "native"}).train()
    assert count_trained(again) == count_trained(theirs)
    assert_close(train(again), train(theirs))


def test_tied_factors_train_as_in_peft(tmp_path: Path) -> None:
    """Under ensure_weight_tying an optimizer moves A and B of the embedding, and as their transposes once more."""

    def host() -> nn.Module:
        return Words(tied=True, embedding="embed_tokens")

    with quiet():
        theirs = get_peft_model(host(), lora(targets="embed_tokens", ensure_weight_tying=True))
        theirs.save_pretrained(tmp_path / "theirs")
    ours = lorac.compile(host(), {"a": tmp_path / "theirs"}).train()
    assert_close(train(ours), train(theirs))
    save_adapter(ours.adapters["a"], tmp_path / "ours", model=host())
    assert_close(load_peft(host(), tmp_path / "ours")(IDS), theirs(IDS))
    save_adapter(ours.adapters["a"], tmp_path / "native", format="native")
    again = lorac.compile(host(), {"a": tmp_path / "native"}).train()
    assert_close(train(again), train(theirs))


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
def test_fresh_rows_train_as_peft_trains_them(tied: bool, tmp_path: Path) -> None:
    """As a method of their own, and in a union with a LoRA, which PEFT reads as LoRA with trainable_token_indices."""
    with quiet():
        theirs = get_peft_model(Words(tied=tied), copy.deepcopy(TRAINED["tokens"]))
    tokens = lorac.TrainableTokens(token_indices=[1, 3], targets=["emb"])
    ours = lorac.compile(Words(tied=tied), {"a": tokens}).train()
    assert_close(train(ours), train(theirs))
    both = lorac.Union(parts=(lorac.LoRA(r=2, targets=["up"]), tokens))
    ours = lorac.compile(Words(tied=tied), {"a": both}).train()
    with lorac.training.LoRAPlus(ours, torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad])):
        train(ours)
    save_adapter(ours.adapters["a"], tmp_path / "both", model=Words(tied=tied))
    read = load_peft(Words(tied=tied), tmp_path / "both")
    assert read.peft_config["default"].trainable_token_indices == {"emb": [1, 3]}
    assert_close(read(IDS), ours(IDS))


def test_rows_stay_rows_in_a_converted_adapter(tmp_path: Path) -> None:
    with quiet():
        get_peft_model(Words(tied=True), copy.deepcopy(TRAINED["list"])).save_pretrained(tmp_path / "theirs")
    read = load_adapter(tmp_path / "theirs", Words(tied=True))
    merged = lorac.merge({"a": read, "b": read}, "linear", [0.5, 0.5], Words(tied=True))
    for adapter in (lorac.resize(read, 1), lorac.to_lora(read), merged):
        assert {len(tensor) for tensor in adapter.replaced.values()} == {9}
        factors = sum(tensor.numel() for tensor in adapter.tensors["up"].values())
        assert count_trained(lorac.compile(Words(tied=True), {"a": adapter})) == 2 * 6 + factors
    with quiet():
        get_peft_model(Words(tied=True), lora([2], use_dora=True)).save_pretrained(tmp_path / "dora")
    hosts = {"first": Words(tied=True), "second": Words(tied=True)}
    several = lorac.compile(hosts, {"a": {"first": tmp_path / "theirs", "second": tmp_path / "dora"}})
    trained = [one.numel() for one in several.adapters["a"].parameters() if one.requires_grad]
    assert sorted(trained) == sorted([2 * 6, 12, 12, 1 * 6, 12, 12, 6])


def test_rejects_tied_layers_with_other_rows(tmp_path: Path) -> None:
    free = lorac.compile(
        Words(tied=False),
        {
            "a": lorac.Union(
                parts=(lorac.LoRA(r=2, targets=["up"]), lorac.TrainableTokens(token_indices=[1], targets=["emb"]))
            )
        },
    )
    with refuses("unsupported_field", match="'lm_head' is tied to 'emb'"):
        save_adapter(free.adapters["a"], tmp_path / "a", model=Words(tied=True))


@pytest.mark.parametrize("numbers", [{"emb.weight": [9]}, {"emb.weight": [1, 1]}, {"up.weight": [0]}], ids=str)
def test_rejects_rows_that_a_file_lacks(numbers: dict[str, list[int]], tmp_path: Path) -> None:
    with quiet():
        get_peft_model(Words(tied=False), copy.deepcopy(TRAINED["list"])).save_pretrained(tmp_path / "theirs")
    read = load_adapter(tmp_path / "theirs", Words(tied=False))
    read.provenance["rows"] = numbers
    save_adapter(read, tmp_path / "strange", format="native")
    with refuses("corrupt_file", match="that its tensors do not have"):
        load_adapter(tmp_path / "strange")
