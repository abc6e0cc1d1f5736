"""peft_type ADALORA, in and out, against PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import nn

import lorac
from lorac.errors import ShapeMismatch, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.formats.peft.config import methods
from lorac.ir.forms import LowRank
from lorac.variants.adalora import AdaLoRA
from lorac.variants.base import Adapter
from tests import parity, peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO

# PEFT warns so of every file that it pruned, and applies the pattern.
pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")


def _config(**settings: Any) -> AdaLoraConfig:
    return AdaLoraConfig(**{"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 10, **settings})


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    return Case(name, model, _config(target_modules=list(targets), **settings))


CASES = (
    _case("bias", "plain_mlp", "up", "head", bias="lora_only", init_r=1),
    _case("saved", "plain_mlp", "up", modules_to_save=["head"], bias="all"),
    _case("conv", "plain_conv", "stem", "dilated", "head"),
    _case("linear", "tiny_llama", "q_proj", "down_proj", layers_to_transform=[0, 2]),
    _case("linear", "tiny_bert", "query", "value", "dense", exclude_modules=["pooler.dense"]),
    _case("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True),
)


@pytest.fixture(autouse=True)
def _ranknum_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT 0.21 trains the scale's denominator by mistake, and does not save it: a file means init_r."""
    wrap = peft_files._wrap

    def wrapped(*arguments: Any) -> PeftModel:
        model = wrap(*arguments)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and "ranknum" not in name)
        return model

    monkeypatch.setattr(peft_files, "_wrap", wrapped)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    assert_eager(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    assert_back(case, tmp_path)


@pytest.mark.parametrize("mode", EMITTED)
def test_onnxruntime(mode: str, tmp_path: Path) -> None:
    assert_onnxruntime(CASES[2], tmp_path, mode)


MARKS = {"up": [True, False, True], "head": [False, False, False], "down": [True, True, True]}


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[nn.Module, PeftModel, Path]:
    """A base, PEFT's model with all but what MARKS keeps masked, and what PEFT saves of it."""
    model = ZOO["plain_mlp"].fresh(torch.float64)
    copied: Any = ZOO["plain_mlp"].fresh(torch.float64)
    masked: Any = get_peft_model(copied, _config(target_modules=list(MARKS)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            path = name.removeprefix("base_model.model.").partition(".lora_E")[0]
            if ".lora_E" in name:
                parameter[~torch.tensor(MARKS[path])] = 0
    masked.peft_config["default"].rank_pattern = {f"{path}.lora_E.default": marks for path, marks in MARKS.items()}
    with peft_files.quiet():
        masked.eval().save_pretrained(str(tmp_path / "pruned"))
    return model, masked, tmp_path / "pruned"


@torch.no_grad()
def test_a_pruned_file_is_the_masked_model(pruned: tuple[nn.Module, PeftModel, Path], tmp_path: Path) -> None:
    model, masked, folder = pruned
    inputs = ZOO["plain_mlp"].inputs()
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"a": folder}, mode=mode)
        parity.assert_parity(compiled(**inputs), masked(**inputs), model(**inputs))
    values = lorac.compile(model, {"a": folder}).pool["a"].values
    assert {path: value.rank for path, value in values.items() if isinstance(value, LowRank)} == {
        "up": 2,
        "down": 3,
        "head": 0,
    }
    save_adapter(load_adapter(folder, model), tmp_path / "again", model=model)
    oracle = peft_files.load_peft(model, tmp_path / "again")
    parity.assert_parity(oracle(**inputs), masked(**inputs), model(**inputs))


def test_what_the_fields_become(pruned: tuple[nn.Module, PeftModel, Path]) -> None:
    variant = load_adapter(pruned[2]).variant
    expected = AdaLoRA(r=3, alpha=5, targets=variant.targets, rank_pattern={k: tuple(v) for k, v in MARKS.items()})
    assert variant == expected


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_pattern_of_another_rank(pruned: tuple[nn.Module, PeftModel, Path]) -> None:
    configure(pruned[2], rank_pattern=None)
    with pytest.raises(ShapeMismatch, match=r"lora_A at '.*' has shape .*, expected \(3, "):
        load_adapter(pruned[2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("init_r", 0),
        ("lora_alpha", 0),
        ("use_dora", True),
        ("loftq_config", {"loftq_bits": 4}),
        ("rank_pattern", {"up.lora_E": 2}),
        ("rank_pattern", {"up": [True]}),
        ("rank_pattern", [True]),
        ("layer_replication", [[0, 1]]),
    ],
)
def test_wrong_fields(pruned: tuple[nn.Module, PeftModel, Path], name: str, value: object) -> None:
    configure(pruned[2], **{name: value})
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(pruned[2])


@torch.no_grad()
def test_ignored_fields(pruned: tuple[nn.Module, PeftModel, Path]) -> None:
    before = load_adapter(pruned[2]).variant
    configure(pruned[2], use_rslora=True, lora_bias=True, alpha_pattern={"up": 7}, r=5)
    assert load_adapter(pruned[2]).variant == before
    inputs = ZOO["plain_mlp"].inputs()
    with pytest.warns(UserWarning, match="`r` is not used"):
        oracle = peft_files.load_peft(pruned[0], pruned[2])
    torch.testing.assert_close(oracle(**inputs), pruned[1](**inputs), rtol=1e-12, atol=1e-12)


def test_peft_reads_what_was_not_trained_by_it(tmp_path: Path) -> None:
    """PEFT wants a number of training steps to read an adapter at all."""
    assert methods()["ADALORA"].fields["total_step"].write(None) == 1
    model = ZOO["plain_mlp"].fresh(torch.float64)
    adapter = lorac.compile(model, {"a": AdaLoRA(r=3, targets=("up", "head"))}).adapters["a"]
    with torch.no_grad():
        for tensors in adapter.tensors.values():
            tensors["lora_E"].fill_(30)
    save_adapter(adapter, tmp_path / "x", model=model)
    inputs = ZOO["plain_mlp"].inputs()
    with torch.no_grad():
        compiled = lorac.compile(model, {"a": adapter})
        parity.assert_parity(compiled(**inputs), peft_files.load_peft(model, tmp_path / "x")(**inputs), model(**inputs))


def test_peft_refuses_groups(tmp_path: Path) -> None:
    tensors = {"lora_A": torch.zeros(2, 30), "lora_E": torch.zeros(2, 1), "lora_B": torch.zeros(8, 2)}
    adapter = Adapter("x", AdaLoRA(r=2, targets=("grouped",)), {"grouped": tensors})
    with pytest.raises(SiteUnsupported, match="ADALORA does not adapt 'grouped', which is conv2d of 2 groups"):
        save_adapter(adapter, tmp_path / "x", model=ZOO["plain_conv"].model())
