"""Uni-LoRA: its assignment against PEFT's, and files of one vector that depend on the model."""

import pytest
import torch
from peft import UniLoraConfig, get_peft_model
from peft.tuners.unilora.model import UniLoraModel
from torch import nn

import lorac
from lorac import UniLoRA
from lorac.testing import assert_close
from lorac.variants.unilora import _assign
from tests.peft_files import change_tensors, configure, save_small
from tests.refusing import refuses
from tests.zoo import ZOO


@pytest.mark.parametrize(("count", "length"), [(10, 3), (9, 3), (2, 7), (500, 31)])
def test_assignment_is_peft_s_and_no_copy_is_used_twice(count, length):
    found = _assign(count, length, 42)
    assert torch.equal(found % length, UniLoraModel.generate_index(count, length, 42))
    assert len(set(found.tolist())) == count


def test_fresh_adapter_has_peft_s_entries():
    def host():
        return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4))

    peft_model = get_peft_model(
        host(), UniLoraConfig(r=2, theta_d_length=9, target_modules=["1", "0"])
    ).base_model.model
    adapter = lorac.compile(host(), {"a": UniLoRA(r=2, theta_d_length=9, targets=["1", "0"])}).adapters["a"]
    thetas = {id(tensors["unilora_theta_d"]) for tensors in adapter.tensors.values()}
    assert len(thetas) == 1
    for path, tensors in adapter.tensors.items():
        layer = getattr(peft_model, path)
        indices = [getattr(layer, f"unilora_indices_{part}")["default"].flatten() for part in "AB"]
        scales = [getattr(layer, f"unilora_scales_{part}")["default"].flatten() for part in "AB"]
        assert torch.equal(tensors["unilora_places"][0] % 9, torch.cat(indices))
        assert_close(tensors["unilora_scales"].detach(), torch.cat(scales))


def test_file_of_one_vector_needs_the_model_and_its_own_indices(tmp_path):
    model = ZOO["plain_mlp"].model()
    folder = save_small(tmp_path / "a", "UNILORA")
    with refuses("base_needed", match="pass model="):
        lorac.load_adapter(folder)
    assert set(lorac.load_adapter(folder, model).tensors) == {"up", "down"}
    whole = save_small(tmp_path / "b", "UNILORA", save_indices=True)
    lorac.load_adapter(whole, model)
    change_tensors(whole, {"model.up.unilora_indices_A": torch.zeros(2, 10, dtype=torch.int64)})
    with refuses("unsupported_field", match="indices_A and unilora_indices_B at 'up' are not those"):
        lorac.load_adapter(whole, model)
    configure(folder, target_modules=["nowhere"])
    with pytest.raises(lorac.LoracError):
        lorac.load_adapter(folder, model)


def test_rejects_saving_a_part_of_the_sites(tmp_path):
    """PEFT would assign the vector to the rest of the sites in another way."""
    model = ZOO["plain_mlp"].model()
    adapter = lorac.load_adapter(save_small(tmp_path / "a", "UNILORA"), model)
    del adapter.tensors["up"]
    with refuses("unsupported_field", match="'unilora_(places|scales)' at 'down' is not the one that PEFT computes"):
        lorac.save_adapter(adapter, tmp_path / "b", model=model)
