"""Routed methods on a language model in ONNX Runtime: equal to eager with every expert chosen, and swapped."""

import copy

import pytest
import torch

import lorac
from lorac.testing.checks import assert_close
from lorac.variants._routing import top_k
from tests.parity import assert_parity
from tests.variants.away import away
from tests.zoo import ZOO

TARGETS = ("q_proj", "down_proj")
METHODS = {
    "fly": (lorac.FlyLoRA(r=6, top_k=2, alpha=9, targets=TARGETS), "chosen", lambda mask: mask > 0),
    "remix": (lorac.ReMix(r=2, experts=4, top_k=2, targets=TARGETS), "router", lambda logits: top_k(logits, 2)),
    "auto": (lorac.AutoLoRA(r=2, experts=3, targets=TARGETS), "router", lambda gates: gates > 0),
}
NAMES = ("router", "chosen", "log_prob")


@pytest.fixture(scope="module")
def programs():
    """The host, an eager and an ONNX Runtime program with one adapter of each method, and inputs of another size."""
    entry = ZOO["tiny_llama"]
    model = entry.model()
    adapters = {name: away(given, model, entry.inputs(), name) for name, (given, _, _) in METHODS.items()}
    for at in adapters["fly"].tensors.values():
        at["lora_topk_bias"].mul_(0.1)
    eager = lorac.compile(model, adapters, aux=NAMES)
    emitted = lorac.compile(model, adapters, target="onnxruntime", aux=NAMES)
    return model, eager, emitted, entry.inputs(batch=3, length=7)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_same_in_onnx_runtime_with_every_expert_chosen(programs, name):
    model, eager, emitted, inputs = programs
    _, aux, chosen = METHODS[name]
    base, own = model(**inputs).logits, emitted(**inputs, adapters=None).logits
    reference = eager(**inputs, adapters=name).logits
    found = emitted(**inputs, adapters=name).logits
    assert_parity(found, reference, base, own_base=own)
    assert emitted.aux.keys() == eager.aux.keys() and set(emitted.aux[aux]) == set(eager.adapters[name].sites)
    for path, value in eager.aux[aux].items():
        assert torch.equal(chosen(emitted.aux[aux][path]), chosen(value))
        assert chosen(value).flatten(0, -2).any(0).all(), f"{path}: no token goes to some expert"
        assert_close(emitted.aux[aux][path], value)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_experts_of_one_structure_are_swapped_without_a_rebuild_and_buffers_are_written(programs, name):
    model, _, emitted, inputs = programs
    other = copy.deepcopy(emitted.adapters[name])
    for at in other.tensors.values():
        for key, tensor in at.items():
            at[key] = tensor.flip(0)
    base, own = model(**inputs).logits, emitted(**inputs, adapters=None).logits
    before = emitted(**inputs, adapters=name).logits
    emitted.add_adapter(other, "other")
    try:
        reference = lorac.compile(model, {"other": other})(**inputs).logits
        assert_parity(emitted(**inputs, adapters="other").logits, reference, base, own_base=own)
        assert torch.equal(emitted(**inputs, adapters=name).logits, before)
        if name == "fly":
            for at in emitted.adapters["other"].tensors.values():
                at["lora_topk_bias"].copy_(torch.tensor([5.0, 0, 0, 0, 0, -5]))
            written = emitted(**inputs, adapters="other").logits
            assert all((mask[..., 0] == 1).all() for mask in emitted.aux["chosen"].values())
            assert not torch.equal(written, reference)
    finally:
        emitted.remove_adapter("other")
