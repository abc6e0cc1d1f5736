"""Break-for-Make: the factor that each loss trains, the frozen one, joining, and the second stage."""

import functools

import pytest
import torch
from torch import nn

import lorac
from lorac.diffusion.break_for_make import HalfSettings, learn_both, learn_half, share_bases
from tests.refusing import refuses

FEW = HalfSettings(steps=5, rate=1e-2, partner_rate=1e-3, partners=2)
WANTED = {name: torch.randn(12, 12, generator=torch.Generator().manual_seed(n)) for n, name in enumerate("abc")}


def host():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))


def fresh():
    compiled = lorac.compile(host(), {"content": lorac.PLP(r=2), "style": lorac.PLP(r=2)}, active="content")
    share_bases(compiled.adapters["content"], compiled.adapters["style"])
    return compiled


def loss(compiled, name, generator):
    x = torch.randn(16, 12, generator=generator)
    return (compiled(x) - x @ WANTED[name]).square().mean()


def losses(compiled, names):
    return [functools.partial(loss, compiled, name) for name in names]


def state(adapter):
    return {(path, key): t.detach().clone() for path, own in adapter.tensors.items() for key, t in own.items()}


def moved(adapter, before):
    """Names of the tensors that changed, at any site, by the largest change."""
    found = {}
    for (path, key), old in before.items():
        change = float((adapter.tensors[path][key].detach() - old).abs().max())
        found[key] = max(found.get(key, 0.0), change)
    return {key: change for key, change in found.items() if change}


@pytest.mark.parametrize(("half", "mine", "theirs"), [("content", "down", "up"), ("style", "up", "down")])
def test_each_loss_trains_its_own_factor(half, mine, theirs):
    compiled = fresh()
    other = state(compiled.adapters["style" if half == "content" else "content"])
    before = state(compiled.adapters[half])
    told = learn_half(compiled, half, losses(compiled, "a")[0], losses(compiled, "bc"), FEW)
    assert len(told) == FEW.steps
    changes = moved(compiled.adapters[half], before)
    assert set(changes) == {f"{mine}_learned", f"{theirs}_learned"}  # the bases stay bit for bit, under decay too
    assert changes[f"{mine}_learned"] > 3 * changes[f"{theirs}_learned"]
    assert not moved(compiled.adapters["style" if half == "content" else "content"], other)


def test_all_losses_of_a_step_see_the_same_noise():
    compiled, seen = fresh(), []

    def noting(generator):
        seen.append(generator.initial_seed())
        return loss(compiled, "a", generator)

    learn_half(compiled, "content", noting, [noting, noting], FEW)
    by_step = [set(seen[at : at + 3]) for at in range(0, len(seen), 3)]
    assert len(by_step) == FEW.steps and all(len(one) == 1 for one in by_step) and len(set().union(*by_step)) == 5


def test_contents_and_styles_that_share_bases_join_in_any_pair():
    compiled = fresh()
    content, style = compiled.adapters["content"], compiled.adapters["style"]
    for half, names in (("content", "abc"), ("style", "cab")):
        own, *partners = losses(compiled, names)
        learn_half(compiled, half, own, partners, FEW)
    joined = lorac.PLP.join(content, style, name="both")
    for path, own in joined.tensors.items():
        assert torch.equal(own["down_frozen"], content.tensors[path]["down_frozen"])
        assert torch.equal(own["down_learned"], content.tensors[path]["down_learned"])
        assert torch.equal(own["up_learned"], style.tensors[path]["up_learned"])


@pytest.mark.parametrize("preconditioned", [True, False])
def test_the_second_stage_moves_both_factors_and_lowers_both_losses(preconditioned):
    content = fresh().adapters["content"]
    compiled = lorac.compile(host(), {"both": content})
    before = state(compiled.adapters["both"])
    settings = HalfSettings(steps=30, rate=2e-2)
    told = learn_both(compiled, "both", *losses(compiled, "ab"), settings, preconditioned=preconditioned, reg=1e-2)
    assert sum(told[-5:]) < sum(told[:5])
    assert set(moved(compiled.adapters["both"], before)) == {"up_learned", "down_learned"}


def test_rejects_unknown_halves_and_missing_partners():
    compiled = fresh()
    [own] = losses(compiled, "a")
    with refuses("choice_error", match="'texture' is not a half"):
        learn_half(compiled, "content", own, [own], FEW, half="texture")
    with refuses("choice_error", match="there are 1 partners, and a step takes 2"):
        learn_half(compiled, "content", own, [own], FEW)
    with refuses("option_error"):
        HalfSettings(decay=-1.0)
    plain = lorac.compile(nn.Sequential(nn.Linear(12, 12)), {"content": lorac.LoRA(r=1)})
    with refuses("choice_error", match=r"'content' \(lora\) has no halves"):
        learn_half(plain, "content", own, [own, own], FEW)
