"""Routed methods on models of tokens in ONNX Runtime: equal to eager with every expert chosen, and swapped."""

import copy
import dataclasses

import pytest
import torch

import lorac
from lorac.testing import assert_close
from lorac.variants._mixtures import top_k_mask
from tests.parity import assert_parity
from tests.variants.away import away
from tests.zoo import ZOO

pytestmark = pytest.mark.medium("the kit's routed methods, and test_meteora.py")

METHODS = {
    "fly": (lorac.FlyLoRA(r=6, top_k=2, alpha=9), "chosen", lambda mask: mask > 0),
    "remix": (lorac.ReMix(r=2, experts=4, top_k=2), "router", lambda logits: top_k_mask(logits, 2)),
    "auto": (lorac.AutoLoRA(r=2, experts=3), "router", lambda gates: gates > 0),
}
NAMES = ("router", "chosen", "log_prob")


class Tokens(torch.nn.Module):
    """Two layers over token vectors."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(7, 9), torch.nn.Linear(9, 7)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def of_tokens():
    def inputs(batch=2, length=5):
        return {"x": torch.randn(batch, length, 7, generator=torch.Generator().manual_seed(batch))}

    free = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}}
    torch.manual_seed(0)
    return Tokens().eval(), inputs, ("up", "down"), {"example_inputs": inputs(), "dynamic_shapes": free}


def of_text():
    entry = ZOO["tiny_llama"]
    return entry.model(), entry.inputs, ("q_proj", "down_proj"), {}


@pytest.fixture(scope="module", params=[of_tokens, pytest.param(of_text, marks=pytest.mark.slow)])
def programs(request):
    """The host, an eager and an ONNX Runtime program with one adapter of each method, and inputs of another size."""
    model, inputs, targets, options = request.param()
    adapters = {
        name: away(dataclasses.replace(given, targets=targets), model, inputs(), name)
        for name, (given, _, _) in METHODS.items()
    }
    for at in adapters["fly"].tensors.values():
        at["lora_topk_bias"].mul_(0.1)
    eager = lorac.compile(model, adapters, aux=NAMES)
    emitted = lorac.compile(model, adapters, target="onnxruntime", aux=NAMES, **options)
    return model, eager, emitted, inputs(batch=3, length=7)


def output(found):
    return getattr(found, "logits", found)


@pytest.mark.slow("the kit's routed methods there")
@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_onnx_runtime_matches_eager_and_uses_every_expert(programs, name):
    model, eager, emitted, inputs = programs
    _, aux, chosen = METHODS[name]
    base, own = output(model(**inputs)), output(emitted(**inputs, adapters=None))
    reference = output(eager(**inputs, adapters=name))
    found = output(emitted(**inputs, adapters=name))
    assert_parity(found, reference, base, own_base=own)
    assert emitted.aux.keys() == eager.aux.keys() and set(emitted.aux[aux]) == set(eager.adapters[name].sites)
    for path, value in eager.aux[aux].items():
        assert torch.equal(chosen(emitted.aux[aux][path]), chosen(value))
        assert chosen(value).flatten(0, -2).any(0).all(), f"{path}: no token goes to some expert"
        assert_close(emitted.aux[aux][path], value)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_swaps_experts_and_writes_buffers_without_a_rebuild(programs, name):
    model, _, emitted, inputs = programs
    other = copy.deepcopy(emitted.adapters[name])
    for at in other.tensors.values():
        for key, tensor in at.items():
            at[key] = tensor.flip(0)
    base, own = output(model(**inputs)), output(emitted(**inputs, adapters=None))
    before = output(emitted(**inputs, adapters=name))
    emitted.add_adapter(other, "other")
    try:
        reference = output(lorac.compile(model, {"other": other})(**inputs))
        assert_parity(output(emitted(**inputs, adapters="other")), reference, base, own_base=own)
        assert torch.equal(output(emitted(**inputs, adapters=name)), before)
        if name == "fly":
            for at in emitted.adapters["other"].tensors.values():
                at["lora_topk_bias"].copy_(torch.tensor([5.0, 0, 0, 0, 0, -5]))
            written = output(emitted(**inputs, adapters="other"))
            assert all((mask[..., 0] == 1).all() for mask in emitted.aux["chosen"].values())
            assert not torch.equal(written, reference)
    finally:
        emitted.remove_adapter("other")
