"""Peculiarities of single PEFT types, and how lorac reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from peft import HRAConfig, LoraConfig, OFTConfig
from safetensors.torch import load_file

import lorac
from lorac import Adapter, BaseNeeded, HiRA, LoKr, LoracError, load_adapter, save_adapter
from lorac.testing import assert_close
from tests import parity
from tests.formats.oracle import assert_equal
from tests.parity import assert_parity
from tests.peft_files import WEIGHTS, change_tensors, configure, load_peft, quiet, save_small, wrap
from tests.refusing import refuses
from tests.zoo import ZOO

MODEL = ZOO["plain_mlp"].model


def test_rejects_fourierft_without_the_model(tmp_path: Path) -> None:
    with pytest.raises(BaseNeeded, match="FOURIERFT does not contain the shapes"):
        load_adapter(save_small(tmp_path / "f", "FOURIERFT"))


@torch.no_grad()
def test_fourierft_chooses_its_positions_by_a_seed(tmp_path: Path) -> None:
    """A native file holds them; to PEFT no others can be written."""
    model, inputs, folder = MODEL(), ZOO["plain_mlp"].inputs(), save_small(tmp_path / "f", "FOURIERFT")
    adapter = load_adapter(folder, model)
    save_adapter(adapter, tmp_path / "a.safetensors", format="native", model=model)
    native = load_adapter(tmp_path / "a.safetensors")
    assert native.tensors["up"]["indices"].shape == (2, 9)
    oracle = load_peft(model, folder)
    parity.assert_parity(lorac.compile(model, {"a": native})(**inputs), oracle(**inputs), model(**inputs))

    adapter.tensors["up"]["indices"] = adapter.tensors["up"]["indices"].flip(-1)
    with refuses("unsupported_field", match="'indices' at 'up' is not the one that PEFT computes"):
        save_adapter(adapter, tmp_path / "x", model=model)


def test_hira_ignores_its_rank_pattern(tmp_path: Path) -> None:
    adapter = load_adapter(save_small(tmp_path / "f", "HIRA", rank_pattern={"up": 1}), MODEL())
    tensors = adapter.tensors["up"]
    assert tensors["hira_A"].shape[0] == 2
    adapter.variant = HiRA(r=2, rank_pattern={"up": 1}, targets=("down", "up"))
    adapter.tensors["up"] = {"hira_A": tensors["hira_A"][:1], "hira_B": tensors["hira_B"][:, :1]}
    with refuses("unsupported_field", match="'up' is of rank 1 by rank_pattern, which PEFT's HIRA ignores"):
        save_adapter(adapter, tmp_path / "x", model=MODEL())


@pytest.mark.medium("odd numbers with and without", keep=["3-False", "1-True"])
@pytest.mark.parametrize("orthonormal", [False, True])
@pytest.mark.parametrize("r", [1, 3])
@torch.no_grad()
def test_hra_of_odd_numbers_and_by_gram_schmidt(tmp_path: Path, r: int, orthonormal: bool) -> None:
    """Neither starts as the identity, and neither can be brought near it: no strength to search for."""
    model, inputs = ZOO["plain_mlp"].fresh(torch.float64), ZOO["plain_mlp"].inputs()
    oracle = wrap(model, HRAConfig(r=r, apply_GS=orthonormal, target_modules=["up", "down"]))
    with quiet():
        oracle.save_pretrained(str(tmp_path))
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"a": tmp_path}, mode=mode)
        assert_close(compiled(**inputs), oracle.eval()(**inputs))


@torch.no_grad()
def test_lokr_on_a_conv1d_with_an_unfactored_w2_is_pefts(tmp_path: Path) -> None:
    """PEFT multiplies (l, m) and (k, n, kw) along other axes; where a file has it so, lorac does, too."""
    entry = ZOO["plain_conv"]
    model, inputs = entry.model(), entry.inputs()
    oracle = load_peft(model, save_small(tmp_path / "f", "LOKR", "plain_conv", r=8, target_modules=["line"]))
    for known in (model, None):
        adapter = load_adapter(tmp_path / "f", known)
        assert isinstance(adapter.variant, LoKr) and adapter.variant.conv1d_of_peft
        for mode in ("live", "baked"):
            answer = lorac.compile(model, {"a": adapter}, mode=mode)(**inputs)
            assert_parity(answer, oracle(**inputs), model(**inputs))
        save_adapter(adapter, tmp_path / "g", model=model)
        before, after = (load_file(tmp_path / folder / WEIGHTS) for folder in ("f", "g"))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    with refuses("unsupported_field", match="LyCORIS does not compute PEFT's product"):
        save_adapter(adapter, tmp_path / "x.safetensors", format="kohya", model=model)


def test_rejects_saving_a_kronecker_product_of_a_conv1d_for_peft(tmp_path: Path) -> None:
    tensors = {"lokr_w1": torch.zeros(1, 1), "lokr_w2": torch.zeros(5, 7 * 3)}
    adapter = Adapter("x", LoKr(r=8, targets=("line",)), {"line": tensors})
    with refuses("unsupported_field", match="'line' is a Conv1d with a whole lokr_w2"):
        save_adapter(adapter, tmp_path / "x", model=ZOO["plain_conv"].model())


def test_miss_that_starts_anywhere_has_the_same_form(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "f", "MISS")
    before = load_adapter(folder).variant
    configure(folder, init_weights=False)
    assert load_adapter(folder).variant == before


@torch.no_grad()
def test_oft_on_convolutions_matches_pefts_merge(tmp_path: Path) -> None:
    """Its forward pass rotates patches and adds them up where they overlap."""
    model, inputs = ZOO["plain_conv"].fresh(torch.float64), ZOO["plain_conv"].inputs(dtype=torch.float64)
    oracle = wrap(model, OFTConfig(oft_block_size=6, target_modules=["stem", "head"])).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in oracle.named_parameters():
        if "oft_R" in name:
            parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    with quiet():
        oracle.save_pretrained(str(tmp_path))
    oracle.merge_adapter()
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"a": tmp_path}, mode=mode)
        parity.assert_parity(compiled(**inputs), oracle(**inputs), model(**inputs))


def test_oft_of_another_series(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "f", "OFT")
    for other in (None, "0.17.1", "0.9.0", "none"):
        configure(folder, peft_version=other)
        with refuses("unsupported_field", match=r"before 0\.18"):
            load_adapter(folder)
    for same in ("0.18.0", "0.19.0.dev0@abc", "1.0"):
        configure(folder, peft_version=same)
        load_adapter(folder)


def test_rejects_a_product_without_rows(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "f", "LOKR", decompose_both=False)
    change_tensors(folder, {"model.up.lokr_w1": torch.ones(0, 2)})
    with pytest.raises(LoracError):
        load_adapter(folder)


def _authors_xs(self, x: torch.Tensor) -> torch.Tensor:
    """``forward_latent`` of MohammadrezaBanaei/LoRA-XS, of an active, unmerged adapter."""
    a, b, dropped = self.lora_A["default"], self.lora_B["default"], self.lora_dropout["default"](x)
    return self.base_layer(x) + b(self.default_lora_latent_mapping(a(dropped))) * self.scaling["default"]


@pytest.mark.medium("the other", cases=["False"])
@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_reads_lora_xs_files_of_the_authors_code(tmp_path: Path, rslora: bool) -> None:
    """A matrix hung on PEFT's layers, saved by PEFT itself; of older releases the key lacks the dot."""
    model, inputs = MODEL(), ZOO["plain_mlp"].inputs()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"], use_rslora=rslora, init_lora_weights=False)
    oracle = wrap(model, config)
    for name, layer in oracle.named_modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.default_lora_latent_mapping = torch.nn.Linear(2, 2, bias=False)
            layer.default_lora_latent_mapping.weight.copy_(torch.tensor([[0.02, -0.06], [0.04, 0.01 * len(name)]]))
            layer.forward = _authors_xs.__get__(layer)
    oracle.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    stored = load_file(tmp_path / "old" / "adapter_model.safetensors")
    cores = {key.removeprefix("base_model."): tensor for key, tensor in stored.items() if "latent" in key}
    renamed = {key.replace(".default_lora_", "_lora_"): tensor for key, tensor in cores.items()}
    change_tensors(tmp_path / "old", {**dict.fromkeys(cores), **renamed})
    for folder in ("new", "old"):
        adapter = load_adapter(tmp_path / folder, model)
        assert adapter.variant.name == "loraxs"
        parity.assert_parity(lorac.compile(model, {"a": adapter})(**inputs), oracle(**inputs), model(**inputs))
    with refuses("unsupported_field", match=r"no type for 'loraxs'.*\n.*lorac\.to_lora"):
        save_adapter(adapter, tmp_path / "x", model=model)
    save_adapter(adapter, tmp_path / "old", "lora_xs", model)
    assert_equal(load_adapter(tmp_path / "old", model), adapter)
    written = load_file(tmp_path / "old" / "adapter_model.safetensors")
    assert {key: t for key, t in written.items() if "latent" in key}.keys() == {f"base_model.{key}" for key in renamed}
    save_adapter(lorac.to_lora(adapter, model), tmp_path / "x", model=model)
    parity.assert_parity(load_peft(model, tmp_path / "x")(**inputs), oracle(**inputs), model(**inputs))
    configure(tmp_path / "new", rank_pattern={"up": 2})
    with refuses("unsupported_field", match="sets more than r, lora_alpha"):
        load_adapter(tmp_path / "new", model)


def test_flylora_without_top_k_names_its_file(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "f", "LORA")
    configure(folder, init_lora_weights="sparse")
    with refuses("unsupported_field", match=r"/f'.*FlyLoRA takes no top_k=None"):
        load_adapter(folder, MODEL())


@pytest.mark.parametrize("form", [True, "bat"])
@torch.no_grad()
def test_bone_is_the_miss_of_older_releases(tmp_path: Path, form: bool | str) -> None:
    """PEFT 0.19 took BONE out: ``scripts/convert-bone-to-miss.py`` renames the tensors and the type."""
    folder = save_small(tmp_path / "miss", "MISS", init_weights=form)
    expected = load_adapter(folder, MODEL())
    shutil.copytree(folder, tmp_path / "bone")
    stored = load_file(tmp_path / "bone" / "adapter_model.safetensors")
    renamed = {key.removeprefix("base_model.").replace("miss_", "bone_"): t for key, t in stored.items()}
    gone = {key.removeprefix("base_model."): None for key in stored}
    change_tensors(tmp_path / "bone", {**gone, **renamed})
    config = json.loads((tmp_path / "bone" / "adapter_config.json").read_text())
    left = {key: value for key, value in config.items() if key not in {"mini_r", "miss_dropout"}}
    (tmp_path / "bone" / "adapter_config.json").write_text(json.dumps({**left, "peft_type": "BONE"}))
    adapter = load_adapter(tmp_path / "bone", MODEL(), expected.name)
    assert adapter.variant == expected.variant
    assert_equal(adapter, expected)
    save_adapter(adapter, tmp_path / "again", model=MODEL())
    assert_equal(load_adapter(tmp_path / "again", MODEL(), expected.name), expected)
