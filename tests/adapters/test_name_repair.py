"""Names of layers that differ from the model's by a prefix are repaired where it is certain, if that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lorac
from lorac.adapters.name_repair import find_own_names
from lorac.frontend.model_view import ModelView
from tests.refusing import refuses
from tests.zoo import ZOO

RENAMED = {
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled around": lambda key: f"_orig_mod.{key}",
    "parallel": lambda key: f"module.{key}",
    "parallel inside": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "sharded": lambda key: key.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "doubled": lambda key: f"base_model.model.{key}",
    "state dict": lambda key: key.replace(".weight", ".default.weight"),
    "without a prefix": lambda key: key.removeprefix("base_model.model."),
    "inside a language model": lambda key: key.replace("model.model.", "model.language_model.model."),
    "base class": lambda key: key.replace("model.model.", "model."),
    "moved": lambda key: key.replace("model.model.", "model.model.language_model."),
}


@pytest.fixture(scope="module")
def model():
    return ZOO["tiny_llama"].model()


def write(folder: Path, tensors: dict, **config) -> Path:
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"]}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config if "peft_type" in config else {**fields, **config}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def sound(model, tmp_path_factory):
    """A LoRA whose tensors differ from each other."""
    sites = {path: site for path, site in lorac.sites(model).items() if path.endswith(("q_proj", "down_proj"))}
    torch.manual_seed(0)
    tensors = {}
    for path, site in sites.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(2, site.in_features)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(site.out_features, 2)
    return write(tmp_path_factory.mktemp("sound") / "lora", tensors)


@pytest.mark.parametrize("kind", RENAMED)
def test_repairs_names_on_request(model, sound, tmp_path, kind):
    tensors = load_file(sound / "adapter_model.safetensors")
    renamed = {RENAMED[kind](key): tensor for key, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    folder = write(tmp_path / "lora", renamed)
    with pytest.raises(lorac.LoracError) as raised:
        lorac.load_adapter(folder, model)
    assert "lorac.load_adapter(path, model, fix_names=True)" in raised.value.next_step
    found = lorac.check(folder, model)
    assert not found.fits
    assert found.repairs == ("lorac.load_adapter(path, model, fix_names=True) gives it the model's names",)
    repaired, wanted = lorac.load_adapter(folder, model, fix_names=True), lorac.load_adapter(sound, model)
    assert repaired.tensors.keys() == wanted.tensors.keys()
    for path, own in wanted.tensors.items():
        assert all(torch.equal(repaired.tensors[path][name], tensor) for name, tensor in own.items())
    lorac.save_adapter(repaired, tmp_path / "again", model=model)
    assert lorac.check(tmp_path / "again", model).fits
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() == tensors.keys()


def test_leaves_right_names_as_they_are(model, sound):
    assert lorac.load_adapter(sound, model, fix_names=True).tensors.keys() == lorac.load_adapter(sound).tensors.keys()


def test_repairs_names_in_the_configuration(model, sound, tmp_path):
    tensors = load_file(sound / "adapter_model.safetensors")
    renamed = {key.replace("model.model.", "model.language_model."): tensor for key, tensor in tensors.items()}
    paths = sorted({key.split(".lora_")[0].removeprefix("base_model.model.") for key in renamed})
    ranks = {"alpha_pattern": {paths[0]: 1}}
    pattern = write(tmp_path / "pattern", renamed, target_modules=r"language_model\.layers\..*", exclude_modules="x")
    listed = write(tmp_path / "listed", renamed, target_modules=paths, **ranks)
    for folder in (pattern, listed):
        repaired = lorac.load_adapter(folder, model, fix_names=True)
        assert repaired.tensors.keys() == lorac.load_adapter(sound).tensors.keys()
    first = next(iter(sorted(repaired.tensors)))
    assert repaired.variant.at_path(first).settings["alpha"] == 1


def test_repairs_saved_modules_and_keeps_shared_tensors(model, tmp_path):
    compiled = lorac.compile(model, {"v": lorac.VeRA(r=2, targets=["q_proj"], modules_to_save=["lm_head"])})
    lorac.save_adapter(compiled.adapters["v"], tmp_path / "v", model=model)
    tensors = load_file(tmp_path / "v" / "adapter_model.safetensors")
    moved = {key.replace("base_model.model.", "base_model.model.module."): tensor for key, tensor in tensors.items()}
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    folder = write(tmp_path / "moved", moved, **config)
    wanted, repaired = lorac.load_adapter(tmp_path / "v", model), lorac.load_adapter(folder, model, fix_names=True)
    assert repaired.replaced.keys() == wanted.replaced.keys() == {"lm_head.weight"}
    assert repaired.tensors.keys() == wanted.tensors.keys()


class Two(nn.Module):
    """Two towers with layers of the same names."""

    def __init__(self, layers: int = 2):
        super().__init__()
        self.text, self.image = (
            nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(3, 4) for _ in range(count))}) for count in (layers, 2)
        )

    def forward(self, x):
        return self.text["layers"][0](x) + self.image["layers"][0](x)


@pytest.mark.parametrize("layers", [2, 3])
def test_rejects_names_that_may_be_of_two_parts(tmp_path, layers):
    tensors = {}
    for number in range(layers):
        tensors[f"base_model.model.layers.{number}.lora_A.weight"] = torch.ones(2, 3)
        tensors[f"base_model.model.layers.{number}.lora_B.weight"] = torch.ones(4, 2)
    folder = write(tmp_path / "lora", tensors, target_modules=[f"layers.{number}" for number in range(layers)])
    if layers == 3:  # only one part has so many
        assert "text.layers.2" in lorac.load_adapter(folder, Two(3), fix_names=True).tensors
        return
    with refuses("unused_tensors", match="no single change of prefixes makes"):
        lorac.load_adapter(folder, Two(2), fix_names=True)
    assert "fix_names" not in str(lorac.check(folder, Two(2)))


def test_never_moves_a_layer_to_another_number(model, tmp_path):
    folder = write(
        tmp_path / "lora",
        {
            "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(2, 64),
            "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": torch.ones(64, 2),
        },
        target_modules=["q_proj"],
    )
    with refuses("unused_tensors", match="no single change of prefixes makes"):
        lorac.load_adapter(folder, model, fix_names=True)


@pytest.mark.parametrize(
    ("names", "own"),
    [
        (["decoder.layers.0.attn.q"], ["text.layers.0.attn.q"]),
        (["layers.7.attn.q"], None),  # a layer's number is never left out
        (["decoder.q"], None),  # one name is too short an end, though the model has it once
        (["a.x.attn.q", "a.y.attn.k"], None),  # two prefixes
    ],
)
def test_moves_names_by_one_long_end(names, own):
    attention = nn.ModuleDict({"q": nn.Linear(3, 3), "k": nn.Linear(3, 3)})
    model = nn.ModuleDict({"text": nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": attention})])})})
    assert find_own_names(names, ModelView.of(model)) == (own and dict(zip(names, own, strict=True)))


def test_rejects_files_without_certain_names(model, sound, tmp_path):
    with pytest.raises(lorac.BaseNeeded, match="only the model tells the right names of layers"):
        lorac.load_adapter(sound, fix_names=True)
    lorac.save_adapter(lorac.load_adapter(sound, model), tmp_path / "a.safetensors", "native")
    with refuses("unsupported_field", match="repairs names only in PEFT's folders") as error:
        lorac.load_adapter(tmp_path / "a.safetensors", model, fix_names=True)
    assert "lorac convert ADAPTER OUT --to peft" in error.value.next_step
    tensors = load_file(sound / "adapter_model.safetensors")
    twice = tensors | {f"module.{key}": tensor + 1 for key, tensor in tensors.items()}
    with refuses("corrupt_file", match="two of its tensors have one name"):
        lorac.load_adapter(write(tmp_path / "twice", twice), model, fix_names=True)
