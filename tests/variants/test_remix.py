"""ReMix: the deployed choice, the probability and frequency of draws, and a router that learns from draws alone."""

import math

import pytest
import torch

import lorac
from lorac.testing import assert_close
from lorac.training import leave_one_out, sum_by_row
from tests.limits import decimals
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.variants.away import away
from tests.variants.routers import Line, X, host

Q = (0.5, 0.3, 0.2)
PAIRS = {(0, 1): 0.3, (0, 2): 0.2, (1, 0): 0.214286, (1, 2): 0.085714, (2, 0): 0.125, (2, 1): 0.075}


def told(depth=1, k=2):
    """Layers of one input, 1, whose router answers log Q."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(depth))).double().eval()
    for layer in model:
        layer.weight.data.zero_()
        layer.bias.data.fill_(1.0)
    compiled = lorac.compile(
        model, {"r": lorac.ReMix(r=1, experts=3, top_k=k, targets="all-linear")}, aux=("log_prob", "router")
    )
    for tensors in compiled.adapters["r"].tensors.values():
        tensors["router"].data.copy_(torch.tensor(Q, dtype=torch.float64).log().unsqueeze(1))
    return compiled


def test_eval_chooses_the_likeliest_experts_and_emits_their_probability():
    compiled = told()
    compiled(torch.ones(1, 1).double())
    assert decimals(compiled.aux["log_prob"]["0"].exp(), 6) == [PAIRS[0, 1]]
    assert decimals(compiled.aux["router"]["0"].softmax(-1)[0], 6) == list(Q)


@torch.no_grad()
def test_draws_come_as_often_as_they_are_likely_and_at_each_layer_by_themselves():
    compiled, count = told(depth=2).train(), 20000
    compiled(torch.ones(count, 1).double())
    first, second = (compiled.aux["log_prob"][path].exp() for path in "01")
    for chance in PAIRS.values():
        found = first.mul(1e6).round() == round(chance * 1e6)
        assert abs(found.double().mean() - chance) < 5 * math.sqrt(chance * (1 - chance) / count)
        both = (found & (second.mul(1e6).round() == round(chance * 1e6))).double().mean()
        assert abs(both - chance**2) < 5 * chance / math.sqrt(count)


@torch.no_grad()
def test_only_training_calls_sample():
    model = host()
    compiled = lorac.compile(model, {"r": away(small(), model, (X,), "r")}, aux=["log_prob"])
    first = compiled(X)
    assert torch.equal(compiled(X), first)
    compiled.train()
    assert not torch.equal(compiled(X), compiled(X))
    torch.manual_seed(3)
    drawn = [compiled(X), compiled(X)]
    torch.manual_seed(3)
    assert all(map(torch.equal, [compiled(X), compiled(X)], drawn))


def small(**fields):
    return lorac.ReMix(**{"r": 2, "experts": 4, "top_k": 2, "targets": ["line"], **fields})


@torch.no_grad()
@pytest.mark.parametrize("rslora", [False, True])
def test_all_at_once_are_a_lora(rslora):
    model = host()
    adapter = away(small(top_k=4, alpha=3, rslora=rslora), model, (X,), "r")
    assert adapter.tensors["line"].keys() == {"lora_A", "lora_B"}
    lora = lorac.Adapter("l", lorac.LoRA(r=8, alpha=3, rslora=rslora, targets=["line"]), adapter.tensors)
    base, reference = model(X), lorac.compile(model, {"l": lora})(X)
    for mode in ("live", "fused", "baked"):
        assert_parity(lorac.compile(model, {"r": adapter}, mode=mode)(X), reference, base)


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_a_choice_has_no_weight_form(mode):
    model = host()
    with refuses("not_mergeable", match=r"no weight form[\s\S]*lorac\.freeze_router"):
        lorac.compile(model, {"r": away(small(), model, (X,), "r")}, mode=mode)


def test_the_loss_of_the_task_gives_the_router_nothing_and_its_draws_give_the_input_nothing():
    model = host()
    compiled = lorac.compile(model, {"r": away(small(), model, (X,), "r")}, aux=["log_prob"]).train()
    x = X.clone().requires_grad_()
    compiled(x).square().sum().backward()
    held = compiled.adapters["r"].tensors["line"]
    assert held["router"].grad is None and held["lora_A"].grad.any() and x.grad.any()
    x.grad = None
    compiled(x)
    sum_by_row(compiled.aux["log_prob"]).sum().backward()
    assert held["router"].grad.any() and x.grad is None


def test_a_router_that_no_loss_of_the_model_trains_is_named_once():
    model = host()
    compiled = lorac.compile(model, {"r": small()})
    with pytest.warns(lorac.LoracWarning, match="'router' of adapter 'r' learns only from") as said:
        compiled.train().train()
    assert len(said) == 1 and 'aux=["log_prob"]' in str(said[0].message)
    lorac.compile(model, {"r": small()}, aux=["log_prob"]).train()
    still = lorac.compile(model, {"r": small()})
    still.adapters["r"].tensors["line"]["router"].requires_grad_(False)
    still.train()
    lorac.compile(model, {"r": small(), "l": lorac.LoRA(r=2, targets=["line"])}, active="l").train()
    lorac.compile(model, {"r": small(top_k=4)}).train()


@pytest.mark.medium("the kit's training of its router, and of its extra outputs")
def test_the_router_learns_by_reinforce():
    """Two kinds of tokens, two experts that are each right for one; only the router trains, by REINFORCE."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False)).double()
    model[0].weight.data.zero_()
    variant = lorac.ReMix(r=1, experts=2, top_k=1, alpha=1, targets=["0"])
    compiled = lorac.compile(model, {"r": variant}, aux=["router", "log_prob"])
    held = compiled.adapters["r"].tensors["0"]
    held["lora_A"].data.copy_(torch.tensor([[0, 0, 1.0, 0], [0, 0, 0, 1]]))
    held["lora_B"].data.fill_(1.0)
    optimizer = torch.optim.AdamW([held["router"]], lr=0.1)
    kind = torch.arange(32) % 2
    x = torch.nn.functional.one_hot(kind, 2).double()
    for _ in range(40):
        values = torch.randn(32, 2, generator=generator, dtype=torch.float64)
        answer = values.gather(1, kind[:, None])[:, 0]
        compiled.train()
        tries = []
        for _ in range(4):
            found = compiled(torch.cat([x, values], 1))[:, 0]
            tries.append(((found - answer).square(), sum_by_row(compiled.aux["log_prob"])))
        optimizer.zero_grad()
        leave_one_out(*map(torch.stack, zip(*tries, strict=True))).backward()
        optimizer.step()
    compiled.eval()
    compiled(torch.cat([x, values], 1))
    assert torch.equal(compiled.aux["router"]["0"].argmax(-1), kind)


class Saving(Line):
    """Computes its layer again in backward."""

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.line, x, use_reentrant=False)


def test_recomputed_activations_are_of_the_same_draws():
    """With other draws the gradients would be another loss's."""
    adapter = away(small(), host(), (X,), "r")

    def gradients(kind):
        model = kind().double()
        model.load_state_dict(host_state)
        compiled = lorac.compile(model, {"r": adapter}, aux=["log_prob"]).train()
        held = compiled.adapters["r"].tensors["line"]
        torch.manual_seed(0)
        return torch.autograd.grad(compiled(X).square().sum(), [held["lora_A"], held["lora_B"]])

    host_state = Line().double().state_dict()
    for one, other in zip(gradients(Line), gradients(Saving), strict=True):
        assert_close(one, other)
