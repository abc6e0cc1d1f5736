"""peft_type ADALORA: files that PEFT pruned, and PEFT's reading of files that it did not write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, PeftModel
from torch import nn

import lorac
from lorac import AdaLoRA, load_adapter, save_adapter
from lorac.formats.peft.config import peft_types
from lorac.ir.algebra.changes import LowRank
from lorac.testing import assert_close
from tests import parity
from tests.peft_files import SMALL, configure, load_peft, quiet, wrap
from tests.refusing import refuses
from tests.zoo import ZOO

MARKS = {"up": [True, False, True], "head": [False, False, False], "down": [True, True, True]}


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[nn.Module, PeftModel, Path]:
    """Return a base, PEFT's model with all but what MARKS keeps masked, and the folder that PEFT saves."""
    model = ZOO["plain_mlp"].fresh(torch.float64)
    masked = wrap(model, AdaLoraConfig(target_modules=list(MARKS), **SMALL["ADALORA"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in masked.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            path = name.removeprefix("base_model.model.").partition(".lora_E")[0]
            if ".lora_E" in name:
                parameter[~torch.tensor(MARKS[path])] = 0
    masked.peft_config["default"].rank_pattern = {f"{path}.lora_E.default": marks for path, marks in MARKS.items()}
    with quiet():
        masked.eval().save_pretrained(str(tmp_path / "pruned"))
    return model, masked, tmp_path / "pruned"


@torch.no_grad()
def test_a_pruned_file_is_the_masked_model(pruned: tuple[nn.Module, PeftModel, Path], tmp_path: Path) -> None:
    model, masked, folder = pruned
    inputs = ZOO["plain_mlp"].inputs()
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"a": folder}, mode=mode)
        parity.assert_parity(compiled(**inputs), masked(**inputs), model(**inputs))
    values = lorac.compile(model, {"a": folder}).pool["a"].changes
    assert {path: value.rank for path, value in values.items() if isinstance(value, LowRank)} == {
        "up": 2,
        "down": 3,
        "head": 0,
    }
    save_adapter(load_adapter(folder, model), tmp_path / "again", model=model)
    oracle = load_peft(model, tmp_path / "again")
    parity.assert_parity(oracle(**inputs), masked(**inputs), model(**inputs))


def test_reads_the_fields(pruned: tuple[nn.Module, PeftModel, Path]) -> None:
    variant = load_adapter(pruned[2]).variant
    expected = AdaLoRA(r=3, alpha=5, targets=variant.targets, rank_pattern={k: tuple(v) for k, v in MARKS.items()})
    assert variant == expected


def test_a_pattern_of_another_rank(pruned: tuple[nn.Module, PeftModel, Path]) -> None:
    configure(pruned[2], rank_pattern=None)
    with refuses("shape_mismatch", match=r"lora_A at '.*' has shape .*, expected \(3, "):
        load_adapter(pruned[2])


@torch.no_grad()
def test_ignored_fields(pruned: tuple[nn.Module, PeftModel, Path]) -> None:
    before = load_adapter(pruned[2]).variant
    configure(pruned[2], use_rslora=True, lora_bias=True, alpha_pattern={"up": 7}, r=5)
    assert load_adapter(pruned[2]).variant == before
    inputs = ZOO["plain_mlp"].inputs()
    with pytest.warns(UserWarning, match="`r` is not used"):
        oracle = load_peft(pruned[0], pruned[2])
    assert_close(oracle(**inputs), pruned[1](**inputs))


def test_peft_reads_an_adapter_made_by_lorac(tmp_path: Path) -> None:
    """PEFT needs a number of training steps to read an adapter."""
    assert peft_types()["ADALORA"].fields["total_step"].write(None) == 1
    model = ZOO["plain_mlp"].fresh(torch.float64)
    adapter = lorac.compile(model, {"a": AdaLoRA(r=3, targets=("up", "head"))}).adapters["a"]
    with torch.no_grad():
        for tensors in adapter.tensors.values():
            tensors["lora_E"].fill_(30)
    save_adapter(adapter, tmp_path / "x", model=model)
    inputs = ZOO["plain_mlp"].inputs()
    with torch.no_grad():
        compiled = lorac.compile(model, {"a": adapter})
        parity.assert_parity(compiled(**inputs), load_peft(model, tmp_path / "x")(**inputs), model(**inputs))
