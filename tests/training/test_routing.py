"""Routers' losses: MeteoRA's against its definition, ReMix's estimator against every outcome there is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from lorac.training import draw_ordered, gate_loss, leave_one_out, ordered_log_prob, sampled_selection_loss
from tests.limits import decimals
from tests.training.rules import drawn, tensor

Q = (0.5, 0.3, 0.2)
LOSSES = {frozenset({0, 1}): 1.0, frozenset({0, 2}): 0.2, frozenset({1, 2}): 0.5}


def pairs() -> list[tuple[int, int]]:
    return list(itertools.permutations(range(3), 2))


def logits() -> Tensor:
    return tensor(Q).log().requires_grad_()


def test_probabilities_of_ordered_draws() -> None:
    found = ordered_log_prob(logits().expand(6, 3), torch.tensor(pairs())).exp()
    assert decimals(found, 6) == [0.3, 0.2, 0.214286, 0.085714, 0.125, 0.075]
    assert_close(found.sum(), tensor(1.0))
    whole = ordered_log_prob(drawn(4, 3, seed=1), torch.tensor([[2, 0, 1]]).expand(4, 3))
    z = drawn(4, 3, seed=1)
    assert_close(whole, z.sum(-1) - z.logsumexp(-1) - z[:, :2].logsumexp(-1) - z[:, 1])


def test_the_estimator_has_no_bias() -> None:
    """Over all pairs of draws its mean is the gradient of the expected loss; so it is over all triples."""
    z = logits()
    chances = ordered_log_prob(z.expand(6, 3), torch.tensor(pairs())).exp()
    losses = tensor([LOSSES[frozenset(pair)] for pair in pairs()])
    (exact,) = torch.autograd.grad((chances * losses).sum(), z)
    assert decimals(exact, 5) == [0.02673, 0.16931, -0.19604]
    for draws in (2, 3):
        mean = torch.zeros(3).double()
        for outcome in itertools.product(range(6), repeat=draws):
            z = logits()
            picked = torch.tensor([pairs()[i] for i in outcome])
            surrogate = leave_one_out(losses[list(outcome)], ordered_log_prob(z.expand(draws, 3), picked))
            assert_close(surrogate.detach(), losses[list(outcome)].mean())
            (gradient,) = torch.autograd.grad(surrogate, z)
            mean += chances[list(outcome)].prod().detach() * gradient
        assert_close(mean, exact)


def test_equal_losses_give_no_gradient_and_constants_cancel() -> None:
    z = logits()
    picked = torch.tensor(pairs()[:4])

    def gradient(losses: Tensor) -> Tensor:
        return torch.autograd.grad(leave_one_out(losses, ordered_log_prob(z.expand(4, 3), picked)), z)[0]

    assert not gradient(torch.full((4,), 0.7).double()).any()
    losses = tensor([1, 2, 4, 8])
    assert torch.equal(gradient(losses), gradient(losses + 16))


def test_losses_keep_their_gradient_and_samples_their_baseline() -> None:
    losses = drawn(3, 2, seed=1).requires_grad_()
    log_probs = drawn(3, 2, seed=2).requires_grad_()
    leave_one_out(losses, log_probs).backward()
    assert_close(losses.grad, torch.full((3, 2), 1 / 6, dtype=torch.float64))
    assert_close(log_probs.grad, (losses - losses.mean(0)).detach() / 2 / 2)
    others = (losses.sum(0) - losses) / 2
    assert_close(log_probs.grad, (losses - others).detach() / 3 / 2)


def test_draws_have_their_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 40_000
    found = draw_ordered(tensor(Q).log().expand(count, 3), 2, generator)
    assert (found[:, 0] != found[:, 1]).all()
    chances = ordered_log_prob(logits().expand(6, 3), torch.tensor(pairs())).exp().tolist()
    for pair, chance in zip(pairs(), chances, strict=True):
        share = int((found == torch.tensor(pair)).all(-1).sum()) / count
        assert abs(share - chance) < 5 * math.sqrt(chance * (1 - chance) / count)


class Text(nn.Module):
    """Two layers over token vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5).double(), nn.Linear(5, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def routed(aux: tuple[str, ...] = ("router",)) -> Any:
    variant = lorac.MeteoRA(r=2, experts=3, targets=["up", "down"])
    return lorac.compile(Text(), {"m": variant}, aux=aux).train()  # type: ignore[attr-defined]  # in eager it is a module


def test_the_gates_loss_by_its_definition() -> None:
    compiled = routed()
    x, experts = drawn(2, 4, 6, seed=1), torch.tensor([[0, 1, 2, -100], [2, 2, 1, 0]])
    compiled(x)
    found = gate_loss(compiled, experts, weight=3.0)
    gates = {path: own["moe_gate"] for path, own in compiled.adapters["m"].tensors.items()}
    up = compiled.host.up
    z = torch.cat([(x @ gates["up"].t())[:, :-1], (F.linear(x, up.weight, up.bias).tanh() @ gates["down"].t())[:, :-1]])
    labels = torch.cat([experts[:, 1:], experts[:, 1:]])
    expected = -z.log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0][labels != -100].mean()
    assert_close(found, 3 * expected)
    found.backward()
    assert all(gate.grad.any() for gate in gates.values())
    for gate in gates.values():
        gate.data.zero_()
    compiled(x)
    assert_close(gate_loss(compiled, torch.tensor([0, 2]), weight=1.0), tensor(math.log(3)))


def test_gates_learn_the_expert_of_each_token() -> None:
    """By a plain loop that adds the loss, with the gates of every layer; three kinds of rows."""
    compiled = routed()
    centres = 2 * drawn(3, 6, seed=9)
    optimizer = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=0.05)
    whose = torch.arange(12) % 3
    for seed in range(40):
        x = centres[whose][:, None] + 0.3 * drawn(12, 4, 6, seed=seed)
        loss = compiled(x).square().mean() + gate_loss(compiled, whose)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    compiled(centres[whose][:, None] + 0.3 * drawn(12, 4, 6, seed=99))
    for found in compiled.aux["router"].values():
        assert (found.argmax(-1) == whose[:, None]).double().mean() > 0.95


def drawing(**options: Any) -> Any:
    compiled = lorac.compile(
        Text(), {"d": lorac.ReMix(r=2, experts=4, top_k=2, targets=["up"])}, **{"aux": ("log_prob",), **options}
    )
    return compiled.train()  # type: ignore[attr-defined]  # in eager it is a module


def test_a_router_learns_from_the_loss_alone() -> None:
    """Two experts undo what is asked for, two do it; the likeliest ones are then the two."""
    compiled = drawing()
    own = compiled.adapters["d"].tensors["up"]
    x = drawn(16, 4, 6, seed=1)
    with torch.no_grad():
        own["lora_A"].copy_(torch.ones(8, 6).double() / 12)
        x = x + (6 - x.sum(-1, keepdim=True)) / 6  # so that A·x is one half, of every row
        goal = compiled.host.down((compiled.host.up(x) + 1).tanh()).detach()
        own["lora_B"].copy_(tensor([1, 1, -1, -1, 1, 1, -1, -1]).expand(5, 8))
    torch.manual_seed(0)
    optimizer = torch.optim.SGD([own["router"]], lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        sampled_selection_loss(
            compiled, {"x": x}, lambda y: (y - torch.cat([goal] * 4)).square().mean((1, 2)), draws=4
        ).backward()
        optimizer.step()
    likely = (x @ own["router"].detach().t()).softmax(-1).mean((0, 1))
    assert likely[0] + likely[2] > 0.8, likely


def test_no_gradient_reaches_a_router_but_by_its_draws() -> None:
    compiled = drawing()
    own = compiled.adapters["d"].tensors["up"]
    own["lora_B"].data.copy_(drawn(*own["lora_B"].shape, seed=3))
    compiled(drawn(2, 4, 6, seed=1)).square().sum().backward()
    assert own["router"].grad is None and own["lora_A"].grad.any()
    sampled_selection_loss(
        compiled, {"x": drawn(2, 4, 6, seed=1)}, lambda y: y.square().mean((1, 2)), draws=3
    ).backward()
    assert own["router"].grad.any()
    compiled.eval()
    assert torch.equal(compiled(drawn(2, 4, 6, seed=1)), compiled(drawn(2, 4, 6, seed=1)))


def test_tries_that_cannot_be() -> None:
    x = drawn(2, 4, 6, seed=1)
    with pytest.raises(lorac.ChoiceError, match="1 draws of 2 rows leave nothing to compare"):
        sampled_selection_loss(drawing(), {"x": x}, lambda y: y.mean((1, 2)), draws=1)
    with pytest.raises(lorac.ChoiceError, match="are not one for each of 4 rows"):
        sampled_selection_loss(drawing(), {"x": x}, lambda y: y.mean())
    with pytest.warns(lorac.LoracWarning, match="'router' of adapter 'd' learns only from"):
        silent = drawing(aux=())
    with pytest.raises(lorac.Unavailable, match="the call gave no 'log_prob'"):
        sampled_selection_loss(silent, {"x": x}, lambda y: y.mean((1, 2)))


def test_rejects_experts_that_do_not_fit_the_logits() -> None:
    compiled = routed()
    x = drawn(2, 4, 6, seed=1)
    compiled(x)
    for experts in (torch.tensor([0, 1, 2]), torch.tensor([[0, 1]]), torch.tensor(1)):
        with pytest.raises(lorac.ChoiceError, match="do not fit logits of shape"):
            gate_loss(compiled, experts)
    with pytest.raises(lorac.ChoiceError, match="there is no expert 3") as error:
        gate_loss(compiled, torch.tensor([0, 3]))
    assert error.value.nearest == "0 to 2"
    silent = routed(aux=())
    silent(x)
    with pytest.raises(lorac.Unavailable, match="gave no logits"):
        gate_loss(silent, torch.tensor([0, 1]))
    for wrong in (torch.ones(1), torch.ones(3)):
        with pytest.raises(lorac.ChoiceError, match="are not two or more draws"):
            leave_one_out(wrong, torch.ones(1))
