"""Writing adapters for PEFT, and rejecting adapters that PEFT cannot hold."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from lorac import Adapter, BaseNeeded, Hydra, LoRA, load_adapter, save_adapter
from tests.formats.oracle import assert_equal
from tests.peft_files import CONFIG, load_peft, make_peft, save_small
from tests.refusing import refuses
from tests.zoo import ZOO


def test_methods_without_a_peft_type(tmp_path: Path) -> None:
    adapter = Adapter("x", Hydra(), {"up": {}})
    with refuses("unsupported_field", match="no type for 'hydra'") as error:
        save_adapter(adapter, tmp_path / "x")
    assert "format='native'" in str(error.value)


def test_saving_needs_the_layout(tmp_path: Path) -> None:
    read = load_adapter(
        save_small(tmp_path / "f", "LORA", "plain_conv", target_modules=["grouped"]), ZOO["plain_conv"].model()
    )
    fresh = Adapter("x", read.variant, read.tensors)
    with pytest.raises(BaseNeeded, match="layout of 'grouped'"):
        save_adapter(fresh, tmp_path / "x")
    save_adapter(fresh, tmp_path / "x", model=ZOO["plain_conv"].model())
    assert_equal(load_adapter(tmp_path / "x", ZOO["plain_conv"].model()), read)


def test_saving_a_grouped_convolution_that_leaves_its_blocks(tmp_path: Path) -> None:
    model = ZOO["plain_conv"].model()
    read = load_adapter(save_small(tmp_path / "f", "LORA", "plain_conv", target_modules=["grouped"]), model)
    read.tensors["grouped"]["lora_B"] = torch.ones(8, 2)
    with refuses("unsupported_field", match="mixes the groups"):
        save_adapter(read, tmp_path / "x", model=model)


def test_rejects_saving_adapters_that_do_not_fit(tmp_path: Path) -> None:
    folder, model = save_small(tmp_path / "f", "LORA"), ZOO["plain_mlp"].model()
    adapter = load_adapter(folder, model)
    adapter.replaced["head.weight"] = model.get_parameter("head.weight").detach() + 1
    with refuses("unsupported_field", match=r"PEFT cannot store 'head.weight'"):
        save_adapter(adapter, tmp_path / "x", model=model)
    adapter = load_adapter(folder, model)
    adapter.tensors["up"]["lora_A"] = torch.ones(2, 3)
    with refuses("shape_mismatch"):
        save_adapter(adapter, tmp_path / "x", model=model)
    assert not (tmp_path / "x").exists()


def test_saving_lora_bias_on_an_embedding(tmp_path: Path) -> None:
    tensors = {"lora_A": torch.ones(1, 23), "lora_B": torch.ones(10, 1), "lora_bias": torch.ones(10)}
    adapter = Adapter("x", LoRA(r=1, lora_bias=True, targets=("embed",)), {"embed": tensors})
    with refuses("site_unsupported", match="no lora_bias on embeddings"):
        save_adapter(adapter, tmp_path / "x", model=ZOO["plain_mlp"].model())


def test_targets_are_written_so_that_peft_finds_the_same_sites(tmp_path: Path) -> None:
    """Whatever the variant says, PEFT must build the adapter's sites and no other."""
    model, inputs = ZOO["tiny_llama"].fresh(torch.float64), ZOO["tiny_llama"].inputs()
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 2])
    make_peft(model, tmp_path / "a", config, inputs=inputs, outputs=["logits"])
    read = load_adapter(tmp_path / "a", model)
    two = dict(list(read.tensors.items())[:2])
    cases: list[tuple[dict[str, Any], dict[str, Any], Any]] = [
        ({"targets": "all-linear"}, read.tensors, sorted(read.tensors)),
        ({"targets": r".*\.(q|v)_proj", "layers": (0, 2)}, read.tensors, sorted(read.tensors)),
        ({"targets": r".*(0|2)\..*\.(q|v)_proj", "layers": ()}, read.tensors, r".*(0|2)\..*\.(q|v)_proj"),
        ({}, two, sorted(two)),
        ({"targets": ("q_proj", "v_proj")}, read.tensors, ["q_proj", "v_proj"]),
    ]
    for index, (fields, tensors, expected) in enumerate(cases):
        variant = LoRA(**{**vars(read.variant), **fields})
        folder = tmp_path / str(index)
        save_adapter(Adapter("x", variant, tensors), folder, model=model)
        assert json.loads((folder / CONFIG).read_text())["target_modules"] == expected
        peft = load_peft(model, folder)
        found = {n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A")}
        assert {name for name in found if name} == set(tensors)
        assert_equal(load_adapter(folder, model), Adapter("x", variant, tensors))


def test_short_targets_are_written_only_where_the_model_is_known(tmp_path: Path) -> None:
    """An adapter alone does not say which other modules have the last part of a path in their names."""
    model = ZOO["tiny_llama"].model()
    read = load_adapter(save_small(tmp_path / "f", "LORA", "tiny_llama", target_modules=["q_proj"]), model)
    adapter = dataclasses.replace(read, variant=dataclasses.replace(read.variant, targets="all-linear"))
    for name, given, expected in (("alone", None, sorted(read.tensors)), ("with", model, ["q_proj"])):
        save_adapter(adapter, tmp_path / name, model=given)
        assert json.loads((tmp_path / name / CONFIG).read_text())["target_modules"] == expected


def test_a_configuration_and_the_tensors_of_another_saving(tmp_path: Path) -> None:
    """Each is in order alone; a copy that was cut short, or another tool, may bring them together."""
    model = ZOO["plain_mlp"].model()
    read = load_adapter(save_small(tmp_path / "f", "LORA"), model)
    other = Adapter("x", dataclasses.replace(read.variant, alpha=32), dict(read.tensors), provenance=read.provenance)
    trained = {path: {name: t + 1 for name, t in at.items()} for path, at in read.tensors.items()}
    later = Adapter("x", read.variant, trained, provenance=read.provenance)
    for name, adapter in (("one", read), ("other", other), ("later", later)):
        save_adapter(adapter, tmp_path / name, model=model)
    for name in ("other", "later"):
        mixture = tmp_path / f"mixed {name}"
        mixture.mkdir()
        shutil.copy(tmp_path / "one" / CONFIG, mixture)
        shutil.copy(tmp_path / name / "adapter_model.safetensors", mixture)
        if name == "later":  # the same configuration: nothing is mixed
            assert_equal(load_adapter(mixture, model), later)
            continue
        with refuses("corrupt_file", match="do not belong together") as error:
            load_adapter(mixture, model)
        assert "lorac_seal" in str(error.value)


def test_peft_takes_a_sealed_folder_and_spaces_do_not_matter(tmp_path: Path) -> None:
    model = ZOO["plain_mlp"].model()
    read = load_adapter(save_small(tmp_path / "f", "LORA"), model)
    save_adapter(read, tmp_path / "x", model=model)
    path = tmp_path / "x" / CONFIG
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    assert_equal(load_adapter(tmp_path / "x", model), read)
    load_peft(ZOO["plain_mlp"].fresh(), tmp_path / "x").save_pretrained(tmp_path / "y")
    assert_equal(load_adapter(tmp_path / "y", model), read)
