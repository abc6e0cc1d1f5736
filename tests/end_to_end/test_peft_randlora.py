"""peft_type RANDLORA, in and out, against PEFT's own outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import RandLoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import lorac
from lorac.errors import BaseNeeded, CorruptFile, ShapeMismatch, SiteUnsupported, UnsupportedField
from lorac.formats import load_adapter, save_adapter
from lorac.variants.randlora import RandLoRA
from tests import peft_files
from tests.end_to_end.peft_cases import Case
from tests.end_to_end.peft_parity import EMITTED, assert_back, assert_eager, assert_onnxruntime
from tests.zoo import ZOO

WEIGHTS = "adapter_model.safetensors"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not save basis_A and basis_B"),
    # lorac writes A and B once; PEFT, which reads them, misses the copies that it makes of them at every site.
    pytest.mark.filterwarnings(r"ignore:Found missing adapter keys while loading the checkpoint. .*randlora_A"),
]


def _case(name: str, model: str, *targets: str, **settings: Any) -> Case:
    config = RandLoraConfig(**{"r": 3, "randlora_alpha": 6, "target_modules": list(targets), **settings})
    return Case(name, model, config)


CASES = (
    _case("plain", "plain_mlp", "up", "down", "head", bias="randlora_only"),
    _case("sparse", "plain_mlp", "up", "down", sparse=True, modules_to_save=["head"], projection_prng_key=4),
    _case("layers", "tiny_llama", "q_proj", "down_proj", layers_to_transform=[0, 2], r=8),
    _case("bias", "tiny_bert", "query", "value", "dense", bias="all", modules_to_save=["classifier"], very_sparse=True),
    _case("conv1d", "tiny_gpt2", "c_attn", "c_proj", fan_in_fan_out=True, r=5),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_what_peft_computes(case: Case, tmp_path: Path) -> None:
    assert_eager(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_there_and_back(case: Case, tmp_path: Path) -> None:
    assert_back(case, tmp_path)


@pytest.mark.parametrize(("model", "target"), [("plain_mlp", "up"), ("tiny_bert", "dense")])
def test_a_file_that_leaves_out_what_its_seed_tells(model: str, target: str, tmp_path: Path) -> None:
    case = _case("seed", model, target, save_projection=False, projection_prng_key=7)
    assert_eager(case, tmp_path / "f")
    assert_back(case, tmp_path, alone=False)


@pytest.mark.parametrize("mode", EMITTED)
def test_onnxruntime(mode: str, tmp_path: Path) -> None:
    assert_onnxruntime(CASES[0], tmp_path, mode)


def made(folder: Path, **settings: Any) -> tuple[nn.Module, Path]:
    model = ZOO["plain_mlp"].fresh()
    config = RandLoraConfig(**{"r": 2, "randlora_alpha": 4, "target_modules": ["up", "down"], **settings})
    peft_files.make_peft(model, folder, config, inputs=ZOO["plain_mlp"].inputs())
    return model, folder


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("law", [{}, {"sparse": True}, {"very_sparse": True}], ids=str)
def test_the_seed_tells_what_peft_draws(law: dict[str, bool], tmp_path: Path) -> None:
    """Bit for bit: a file without A and B is read as the same file with them."""
    settings = {"projection_prng_key": 11, **law}
    with_both = load_adapter(made(tmp_path / "f", **settings)[1])
    model, folder = made(tmp_path / "g", save_projection=False, **settings)
    assert {name.rpartition(".")[2] for name in load_file(folder / WEIGHTS)} == {"randlora_lambda", "randlora_gamma"}
    drawn = load_adapter(folder, model)
    for path, tensors in with_both.tensors.items():
        for name in ("randlora_A", "randlora_B"):
            assert torch.equal(drawn.tensors[path][name], tensors[name])
    with pytest.raises(BaseNeeded, match="save_projection=False"):
        load_adapter(folder)


def test_the_copies_at_every_site_are_checked_and_kept_once(tmp_path: Path) -> None:
    model, folder = made(tmp_path / "f")
    tensors = load_file(folder / WEIGHTS)
    copies = [name for name in tensors if name.endswith("randlora_B")]
    assert len(copies) == 3
    adapter = load_adapter(folder, model)
    assert len({id(at["randlora_B"]) for at in adapter.tensors.values()}) == 1
    tensors["base_model.model.down.randlora_B"][0, 0, 0] += 1
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CorruptFile, match="copies of one tensor, and differ"):
        load_adapter(folder, model)


def test_copies_alone_will_do(tmp_path: Path) -> None:
    model, folder = made(tmp_path / "f")
    before, tensors = load_adapter(folder, model), load_file(folder / WEIGHTS)
    save_file({name: t for name, t in tensors.items() if ".model." in name}, folder / WEIGHTS)
    assert torch.equal(load_adapter(folder, model).tensors["up"]["randlora_A"], before.tensors["up"]["randlora_A"])


@pytest.mark.parametrize("targets", [("up",), ("up", "down", "head")])
def test_a_fresh_one_is_loaded_by_peft(targets: tuple[str, ...], tmp_path: Path) -> None:
    """Also where largest out and largest in are of different sites, and PEFT's A and B larger than any site asks."""
    model = ZOO["plain_mlp"].fresh(torch.float64)
    compiled = lorac.compile(model, {"a": RandLoRA(r=2, alpha=4, targets=targets)})
    tokens = ZOO["plain_mlp"].inputs()
    with torch.no_grad():
        for tensors in compiled.adapters["a"].tensors.values():
            tensors["randlora_lambda"].normal_()
        save_adapter(compiled.adapters["a"], tmp_path / "f", model=model)
        torch.testing.assert_close(peft_files.load_peft(model, tmp_path / "f")(**tokens), compiled(**tokens))


def test_what_the_fields_become(tmp_path: Path) -> None:
    settings = {"projection_prng_key": 3, "randlora_dropout": 0.25, "bias": "randlora_only", "sparse": True}
    variant = load_adapter(made(tmp_path / "f", **settings)[1]).variant
    assert sorted(variant.targets) == ["down", "up"]
    expected = RandLoRA(
        r=2,
        alpha=4,
        projection_prng_key=3,
        dropout=0.25,
        bias="randlora_only",
        sparse=True,
        targets=variant.targets,
    )
    assert variant == expected


@pytest.mark.parametrize(
    ("name", "value"), [("r", 0), ("randlora_alpha", None), ("sparse", 1), ("projection_prng_key", 0.5)]
)
def test_wrong_fields(tmp_path: Path, name: str, value: object) -> None:
    folder = made(tmp_path / "f")[1]
    configure(folder, **{name: value})
    with pytest.raises(UnsupportedField, match=f"sets {name}="):
        load_adapter(folder)


def test_a_rank_that_is_not_the_files(tmp_path: Path) -> None:
    model, folder = made(tmp_path / "f")
    configure(folder, r=3)
    with pytest.raises(ShapeMismatch, match=r"randlora_A at 'down' has shape \(2, 1, 14\), expected \(3, 1, 6\)"):
        load_adapter(folder, model)


def test_peft_adapts_linear_layers_only(tmp_path: Path) -> None:
    model = ZOO["plain_mlp"].model()
    adapter = lorac.compile(model, {"a": RandLoRA(r=2, targets=("embed",))}).adapters["a"]
    with pytest.raises(SiteUnsupported, match="RANDLORA does not adapt 'embed', which is embedding"):
        save_adapter(adapter, tmp_path / "x", model=model)
