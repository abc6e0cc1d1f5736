"""Lily's sharing, which PEFT finds from targets, and its mean over a call."""

import pytest
import torch
from peft import LilyConfig

import lorac
from lorac import Lily
from lorac.testing import assert_close
from tests.parity import assert_parity
from tests.peft_files import load_peft, make_peft
from tests.refusing import refuses
from tests.zoo import ZOO

TARGETS = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def base():
    return ZOO["tiny_llama"].fresh(torch.float64)


def path(layer, target="self_attn.q_proj"):
    return f"model.layers.{layer}.{target}"


def fresh(base, **fields):
    """A fresh adapter whose B is away from zero."""
    compiled = lorac.compile(base, {"a": Lily(r=2, targets=TARGETS, **fields)})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in {id(at["lily_B"]): at["lily_B"] for at in compiled.adapters["a"].tensors.values()}.values():
            tensor.normal_(0, 0.2, generator=generator)
    return compiled


def test_neighbours_share_a_and_all_layers_of_a_target_share_b(base):
    tensors = fresh(base, stride_A=2).adapters["a"].tensors
    assert tensors[path(0)]["lily_A"] is tensors[path(1)]["lily_A"]
    assert tensors[path(0)]["lily_A"] is not tensors[path(2)]["lily_A"]
    assert tensors[path(0)]["lily_B"] is tensors[path(2)]["lily_B"]
    assert tensors[path(0)]["lily_B"] is not tensors[path(0, "mlp.down_proj")]["lily_B"]
    assert len({id(at["lily_router"]) for at in tensors.values()}) == len(tensors)


@torch.no_grad()
def test_peft_loads_a_fresh_adapter(base, tmp_path):
    compiled, inputs = fresh(base, stride_A=2), ZOO["tiny_llama"].inputs()
    lorac.save_adapter(compiled.adapters["a"], tmp_path / "a", model=base)
    assert_parity(compiled(**inputs), load_peft(base, tmp_path / "a")(**inputs), base(**inputs))


def test_copies_of_a_file_stay_one_tensor(base, tmp_path):
    config = LilyConfig(r=2, stride_A=2, target_modules=list(TARGETS))
    make_peft(base, tmp_path / "a", config, inputs=ZOO["tiny_llama"].inputs(), outputs=ZOO["tiny_llama"].outputs)
    tensors = lorac.load_adapter(tmp_path / "a", base).tensors
    assert tensors[path(0)]["lily_A"] is tensors[path(1)]["lily_A"]
    assert tensors[path(0)]["lily_B"] is tensors[path(2)]["lily_B"]


def test_rejects_saving_copies_that_peft_would_make_equal(base, tmp_path):
    adapter = fresh(base).adapters["a"]
    adapter.tensors[path(1)]["lily_B"] = adapter.tensors[path(1)]["lily_B"].detach() + 1
    with refuses("unsupported_field", match=rf"one lily_B for '{path(1)}' and '{path(0)}'"):
        lorac.save_adapter(adapter, tmp_path / "a", model=base)
    assert not (tmp_path / "a").exists()
    lorac.save_adapter(adapter, tmp_path / "a.safetensors", format="native", model=base)


@torch.no_grad()
@pytest.mark.parametrize("target", ["eager", pytest.param("onnxruntime", marks=pytest.mark.medium("eager's rows"))])
def test_rows_of_a_call_are_averaged_by_adapter(target, base):
    model = base if target == "eager" else ZOO["tiny_llama"].fresh(torch.float32)
    ids = torch.randint(0, 100, (3, 5), generator=torch.Generator().manual_seed(2))
    adapter = fresh(model).adapters["a"]
    options = {} if target == "eager" else {"example_inputs": {"input_ids": ids, "use_cache": False}}
    compiled = lorac.compile(model, {"a": adapter}, target=target, **options)
    found = compiled(input_ids=ids, adapters=["a", None, "a"], use_cache=False).logits
    both = compiled(input_ids=ids[::2], adapters="a", use_cache=False).logits
    assert_parity(found[::2], both, model(input_ids=ids[::2], use_cache=False).logits)
    assert_close(found[1], model(input_ids=ids, use_cache=False).logits[1])
