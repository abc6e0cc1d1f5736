"""TinyLoRA: its groups, cores and factors against PEFT's, and tensors that a group shares."""

import pytest
import torch
from peft import TinyLoraConfig, get_peft_model
from torch import nn

import lorac
from lorac import TinyLoRA
from lorac.testing import assert_close
from tests.refusing import refuses


def host():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        table = nn.Embedding(19, 6)
        return nn.Sequential(table, *(nn.Linear(6, 6) for _ in range(4)), nn.Linear(6, 1))


@pytest.mark.parametrize("tying", [0.0, 0.4, 0.5, 0.7, 1.0])
def test_fresh_adapter_is_peft_s(tying):
    """A rank above a layer's width is the width; layers are counted in the order of the model."""
    names = ["5", "0", "1", "2", "3"]
    peft_model = get_peft_model(host(), TinyLoraConfig(u=3, weight_tying=tying, target_modules=names)).base_model.model
    found = lorac.compile(host(), {"a": TinyLoRA(u=3, weight_tying=tying, targets=names)}).adapters["a"].tensors
    assert set(found) == set(names)
    vectors = {path: tensors["tinylora_v"] for path, tensors in found.items()}
    for path, tensors in found.items():
        layer = getattr(peft_model, path)
        same = [other for other in names if getattr(peft_model, other)._tinylora_v_key == layer._tinylora_v_key]
        assert [other for other in names if vectors[other] is vectors[path]] == same
        stored = {part: getattr(layer, f"tinylora_{part}")["default"] for part in "ABP"}
        if path == "0":
            stored = {"A": stored["B"].t(), "B": stored["A"].t(), "P": stored["P"]}
        for part, expected in stored.items():
            assert_close(tensors[f"tinylora_{part}"].detach(), expected)


@torch.no_grad()
def test_group_of_sites_trains_one_vector(tmp_path):
    model = host()
    variant = TinyLoRA(u=3, weight_tying=1.0, targets=["1", "2"])
    compiled = lorac.compile(model, {"a": variant}, example_inputs=(torch.tensor([3]),))
    trained = [parameter for parameter in compiled.parameters() if parameter.requires_grad]
    assert [tuple(parameter.shape) for parameter in trained] == [(3,)]
    assert torch.equal(compiled(torch.tensor([3])), model(torch.tensor([3])))


def test_rejects_saving_sites_whose_groups_peft_would_make_otherwise(tmp_path):
    """Two vectors for two layers, which with weight_tying=1 PEFT gives one."""
    model = host()
    adapter = lorac.compile(model, {"a": TinyLoRA(u=3, targets=["1", "2"])}).adapters["a"]
    adapter.tensors["2"]["tinylora_v"] = torch.ones(3)
    lorac.save_adapter(adapter, tmp_path / "a", model=model)
    tied = lorac.Adapter("a", TinyLoRA(u=3, weight_tying=1.0, targets=["1", "2"]), adapter.tensors)
    with refuses("unsupported_field", match=r"sites of adapter 'a' have different 'tinylora_v.0'"):
        lorac.save_adapter(tied, tmp_path / "b", model=model)
