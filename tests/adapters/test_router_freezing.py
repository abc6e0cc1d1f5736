"""A router frozen to a constant choice is the LoRA that it was where its choice was constant anyway."""

import pytest
import torch

import lorac
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.variants.away import away, drawn
from tests.variants.routers import X, host, loras


@torch.no_grad()
def constant(method):
    """A routed adapter whose choice is the same for every token, and what that is."""
    model = host()
    if method == "meteora":  # equal logits: the first two, each by half
        adapter = lorac.MeteoRA.from_loras(loras(model, (X,)))
        adapter.tensors["line"]["moe_gate"].zero_()
        return adapter, [0.5, 0.5, 0, 0]
    if method == "remix":
        adapter = away(lorac.ReMix(r=2, experts=3, top_k=2, alpha=5, targets=["line"]), model, (X,), "r")
        adapter.tensors["line"]["router"].zero_()
        return adapter, [1, 1, 0]
    if method == "flylora":
        adapter = away(lorac.FlyLoRA(r=5, top_k=2, alpha=7, targets=["line"]), model, (X,), "f")
        adapter.tensors["line"]["lora_topk_bias"].copy_(torch.tensor([0, 90, 0, 90, 0]))
        return adapter, [0, 1, 0, 1, 0]
    adapter = away(lorac.AutoLoRA(r=2, experts=3, targets=["line"]), model, (X,), "a")
    for name in ("weight_base", "weight_lora", "weight_cross", "bias"):
        adapter.tensors["line"][name].zero_()
    adapter.tensors["line"]["bias"].fill_(0.4)
    return adapter, torch.tensor(0.4, dtype=torch.float64).sigmoid().expand(3)


METHODS = ("meteora", "remix", "flylora", "autolora")


@pytest.mark.medium("two routers, one in each mode", keep=["live-meteora", "fused-flylora"])
@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_constant_choice_is_a_lora(method, mode):
    model = host()
    adapter, weights = constant(method)
    reference = lorac.compile(model, {"a": adapter})(X)
    frozen = lorac.freeze_router(adapter, weights, name="frozen")
    assert frozen.name == "frozen" and frozen.variant.name == "lora"
    assert_parity(lorac.compile(model, {"a": frozen}, mode=mode)(X), reference, model(X))


@pytest.mark.medium("one router", keep=["flylora"])
@pytest.mark.parametrize("method", METHODS)
def test_rejects_a_router_as_a_lora_before_it_is_frozen(method):
    with refuses("not_mergeable", match="not edit the weight"):
        lorac.to_lora(constant(method)[0], host(), rank=2)


@torch.no_grad()
def test_returns_the_mixture_of_the_loras():
    model = host()
    experts = loras(model, (X,))
    routed = lorac.MeteoRA.from_loras(experts)
    compiled = lorac.compile(model, {lora.name: lora for lora in experts})
    base = model(X)
    frozen = lorac.freeze_router(routed, [0.3, 0, 0.7, 0])
    assert_parity(lorac.compile(model, {"a": frozen})(X), compiled(X, adapters={"l0": 0.3, "l2": 0.7}), base)
    alone = lorac.freeze_router(routed, {"line": torch.tensor([0, 1.0, 0, 0])})
    assert_parity(lorac.compile(model, {"a": alone})(X), compiled(X, adapters="l1"), base)
    assert frozen.variant.r == 2 * routed.variant.r and alone.variant.r == routed.variant.r
    none = lorac.freeze_router(routed, [0, 0, 0, 0])
    assert torch.equal(lorac.compile(model, {"a": none})(X), base)


@torch.no_grad()
def test_each_site_may_have_weights_of_its_own_and_the_file_is_a_loras(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(7, 6), torch.nn.Tanh(), torch.nn.Linear(6, 5)).double().eval()
    routed = drawn(lorac.MeteoRA(r=2, experts=2, targets=["0", "2"]), model, "m")
    rows = [[0.2, 0.8], [1.0, 0.0]]
    frozen = lorac.freeze_router(routed, rows)
    assert [frozen.tensors[path]["lora_A"].shape[0] for path in ("0", "2")] == [4, 2]
    by_path = lorac.freeze_router(routed, dict(zip(("0", "2"), rows, strict=True)))
    first, second = (lorac.compile(model, {"a": adapter})(X) for adapter in (frozen, by_path))
    assert torch.equal(first, second)
    lorac.save_adapter(frozen, tmp_path / "peft", model=model)
    loaded = lorac.load_adapter(tmp_path / "peft", model)
    assert torch.equal(lorac.compile(model, {"a": loaded})(X), first)


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        ([0.5, 0.5], lorac.AdapterError, "the 4 experts at 'line'"),
        ([[0.25] * 4] * 2, lorac.AdapterError, "the 4 experts"),
        ({"lines": [0.25] * 4}, lorac.SiteError, "'line"),
        ({}, lorac.SiteError, "no weights are given for 'line'"),
        (["a"] * 4, lorac.WrongType, "numbers"),
        ([0.5, 0.5, 0, float("nan")], lorac.WrongType, "finite"),
    ],
)
def test_rejects_weights_that_are_not_a_choice(weights, error, text):
    with pytest.raises(error, match=text):
        lorac.freeze_router(constant("meteora")[0], weights)


def test_rejects_methods_without_a_router():
    (lora,) = loras(host(), (X,), (2,))
    with pytest.raises(lorac.AdapterError, match="routes between no experts"):
        lorac.freeze_router(lora, [1.0])
    with pytest.raises(lorac.WrongType):
        lorac.freeze_router("path", [1.0])
