"""DyLoRA's rule: one rank per step for all layers, components that move, and components that are left bit for bit."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from lorac.training import NestedRanks
from tests.training.loops import TARGETS, by_trainer, data, host, plain_loop, trained
from tests.training.rules import drawn, linear

R, ALPHA = 4, 6
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda tensors: torch.optim.AdamW(tensors, lr=1e-2, weight_decay=0.1),
    "adamw-fused": lambda tensors: torch.optim.AdamW(tensors, lr=1e-2, weight_decay=0.1, fused=True),
    "adam-l2": lambda tensors: torch.optim.Adam(tensors, lr=1e-2, weight_decay=0.1),
    "momentum": lambda tensors: torch.optim.SGD(tensors, lr=1e-3, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "adagrad": lambda tensors: torch.optim.Adagrad(tensors, lr=1e-2, initial_accumulator_value=0.1),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def compiled_with(a: Tensor, b: Tensor) -> tuple[Any, Tensor, Tensor]:
    """One layer 9 -> 8 with DyLoRA's factors, and the adapter's own."""
    variant = lorac.DyLoRA(r=R, alpha=ALPHA, targets=("site",))
    adapter = lorac.Adapter("a", variant, {"site": {"lora_A": a, "lora_B": b}})
    compiled = lorac.compile(linear(9, 8), {"a": adapter}).train()
    own = compiled.adapters["a"].tensors["site"]
    return compiled, own["lora_A"], own["lora_B"]


def started() -> tuple[Any, Tensor, Tensor]:
    return compiled_with(drawn(R, 9, seed=1), drawn(8, R, seed=2))


def step(compiled: Any, optimizer: Any, seed: int = 3) -> None:
    """One step on a random regression."""
    optimizer.zero_grad()
    (compiled(drawn(5, 9, seed=seed)) - drawn(5, 8, seed=seed + 1)).square().sum().backward()
    optimizer.step()


def others(a: Tensor, b: Tensor, moving: int) -> tuple[Tensor, Tensor]:
    """All rows of A and columns of B but one, counted from 1."""
    left = [i for i in range(R) if i != moving - 1]
    return a.detach()[left].clone(), b.detach()[:, left].clone()


class Components(nn.Module):
    """The same layer with every component a parameter of its own: what skipping means without anything to skip."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base = linear(9, 8).site.weight.detach()
        self.a = nn.ParameterList(nn.Parameter(row[None].clone()) for row in a)
        self.b = nn.ParameterList(nn.Parameter(column[:, None].clone()) for column in b.T)

    def forward(self, x: Tensor, rank: int, *, frozen: bool) -> Tensor:
        moved = [self.b[i] @ self.a[i] for i in range(rank)]
        moved = [m.detach() if frozen and i < rank - 1 else m for i, m in enumerate(moved)]
        return x @ (self.base + ALPHA / rank * sum(moved)).T


@pytest.mark.medium("an optimizer with weight decay and one with momentum", keep=["adamw-all", "momentum-frozen"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "all"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matches_an_optimizer_over_single_components(name: str, frozen: bool) -> None:
    compiled, a, b = started()
    reference = Components(a.detach(), b.detach())
    optimizer, expected = OPTIMIZERS[name](trained(compiled)), OPTIMIZERS[name](reference.parameters())
    rule = NestedRanks(compiled, optimizer, frozen=frozen, generator=seeded())
    ranks = []
    for seed in range(12):
        ranks.append(rule.rank)
        expected.zero_grad()
        x, y = drawn(5, 9, seed=seed), drawn(5, 8, seed=seed + 1)
        (reference(x, rule.rank, frozen=frozen) - y).square().sum().backward()
        expected.step()
        step(compiled, optimizer, seed)
    assert set(ranks) == {1, 2, 3, 4}
    assert_close(a.detach(), torch.cat([*reference.a]).detach())
    assert_close(b.detach(), torch.cat([*reference.b], dim=1).detach())


def test_frozen_steps_leave_all_other_components() -> None:
    """b = 3 for several steps under AdamW with weight decay, after steps that gave every component a state."""
    compiled, a, b = started()
    optimizer = OPTIMIZERS["adamw"](trained(compiled))
    step(compiled, optimizer)
    with NestedRanks(compiled, optimizer, ranks=(3,)):
        before = others(a, b, 3)
        moments = {
            key: others(optimizer.state[a][key], optimizer.state[b][key], 3) for key in ("exp_avg", "exp_avg_sq")
        }
        for seed in range(4):
            own = a.detach()[2].clone(), b.detach()[:, 2].clone()
            step(compiled, optimizer, seed)
            assert all((now != then).all() for now, then in zip((a[2], b[:, 2]), own, strict=True))
            assert all(map(torch.equal, others(a, b, 3), before))
    for key, expected in moments.items():
        now = optimizer.state[a][key], optimizer.state[b][key]
        assert all(map(torch.equal, others(*now, 3), expected))


def test_all_components_up_to_the_rank_move() -> None:
    compiled, a, b = started()
    optimizer = OPTIMIZERS["adamw"](trained(compiled))
    NestedRanks(compiled, optimizer, ranks=(3,), frozen=False)
    before = a.detach().clone(), b.detach().clone()
    for seed in range(3):
        step(compiled, optimizer, seed)
    assert (a != before[0]).all(dim=1).tolist() == [True, True, True, False]
    assert (b != before[1]).all(dim=0).tolist() == [True, True, True, False]
    assert torch.equal(a[3], before[0][3]) and torch.equal(b[:, 3], before[1][:, 3])


def test_the_released_codes_momentum_moves_the_others() -> None:
    """Gradients of zero: plain SGD leaves the others, momentum and weight decay do not."""
    for optimizer_of, still in ((lambda p: torch.optim.SGD(p, lr=1e-3), True), (OPTIMIZERS["adamw"], False)):
        compiled, a, b = started()
        optimizer = optimizer_of(trained(compiled))
        step(compiled, optimizer)
        NestedRanks(compiled, optimizer, ranks=(3,), exact_skip=False)
        before = others(a, b, 3)
        step(compiled, optimizer)
        assert not a.grad[[0, 1, 3]].any() and not b.grad[:, [0, 1, 3]].any()
        assert a.grad[2].all() and b.grad[:, 2].all()
        assert all(torch.equal(now, then) == still for now, then in zip(others(a, b, 3), before, strict=True))


def test_a_step_runs_at_its_rank() -> None:
    """R = 4, α = 6, b = 2: W' = W + 6/2·B[:, :2]·A[:2] in training; the whole rank in evaluation, and afterwards."""
    compiled, a, b = started()
    x, base = drawn(5, 9, seed=3), linear(9, 8).site.weight.detach()
    cut, whole = (x @ (base + ALPHA / n * b.detach()[:, :n] @ a.detach()[:n]).T for n in (2, R))
    with NestedRanks(compiled, torch.optim.SGD(trained(compiled), lr=1), ranks=[2]) as rule:
        assert rule.rank == 2
        assert_close(compiled(x).detach(), cut)
        assert_close(compiled(x, adapters="a").detach(), whole)
        compiled.eval()
        assert_close(compiled(x).detach(), cut)
        with torch.no_grad():
            assert_close(compiled(x), whole)
    assert compiled.active == {"a": 1}
    assert_close(compiled.train()(x).detach(), whole)


def test_other_adapters_keep_their_full_rank() -> None:
    nested_one, lora = started()[0].adapters["a"], lorac.LoRA(r=2, alpha=2, targets=("site",))
    compiled = lorac.compile(linear(9, 8), {"a": nested_one, "b": lora}, active={"a": 0.5, "b": 2}).train()
    (a, b), own = compiled.adapters["a"].tensors["site"].values(), compiled.adapters["b"].tensors["site"]
    own["lora_B"].data.copy_(drawn(8, 2, seed=4))
    x, base = drawn(5, 9, seed=3), linear(9, 8).site.weight.detach()
    moved = 0.5 * ALPHA * b[:, :1] @ a[:1] + 2 * own["lora_B"] @ own["lora_A"]
    NestedRanks(compiled, torch.optim.SGD(trained(compiled), lr=1), ranks=(1,))
    assert_close(compiled(x), x @ (base + moved).T)


def test_fused_weights_train_as_live_ones() -> None:
    compiled, a, b = started()
    fused = lorac.compile(linear(9, 8), {"a": compiled.adapters["a"]}, mode="fused").train()
    for one in (compiled, fused):
        optimizer = torch.optim.SGD(trained(one), lr=1e-3)
        with NestedRanks(one, optimizer, ranks=(1, 3), generator=seeded()):
            for seed in range(4):
                step(one, optimizer, seed)
    own = fused.adapters["a"].tensors["site"]
    assert_close(own["lora_A"], a)
    assert_close(own["lora_B"], b)


@pytest.mark.medium("test_a_run_resumes_exactly, which draws the same ranks")
def test_draws_are_seeded_and_weighted() -> None:
    compiled, *_ = started()
    optimizer = torch.optim.SGD(trained(compiled), lr=0)

    def ranks(count: int = 20, **options: Any) -> list[int]:
        found = []
        with NestedRanks(compiled, optimizer, **options) as rule:
            for _ in range(count):
                found.append(rule.rank)
                optimizer.step()
        return found

    assert ranks(generator=seeded(1)) == ranks(generator=seeded(1)) != ranks(generator=seeded(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        state = torch.get_rng_state()
        by_torch = ranks()
        assert torch.equal(torch.get_rng_state(), state)
        assert ranks() == by_torch
    counts = Counter(ranks(2000, ranks=(2, 3, 4), weights=(1, 0, 3), generator=seeded()))
    assert set(counts) == {2, 4}
    assert abs(counts[4] - 1500) < 4 * (2000 * 0.25 * 0.75) ** 0.5  # four standard deviations
    counts = Counter(ranks(2000, generator=seeded()))
    assert all(abs(counts[b] - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5 for b in (1, 2, 3, 4))


def test_layers_below_the_rank_are_used_but_not_trained() -> None:
    """r = 3 and 2: at b = 3 the second has no component 3; unfrozen, both of its components move."""
    model = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 9)).double()
    variant = lorac.DyLoRA(r=3, rank_pattern={"1": 2}, targets=("0", "1"))
    for frozen, rank, expected in ((True, 3, (1, 0)), (True, 2, (1, 1)), (False, 3, (3, 2))):
        compiled = lorac.compile(model, {"a": variant}).train()
        tensors = [compiled.adapters["a"].tensors[path] for path in "01"]
        for own in tensors:
            own["lora_B"].data.copy_(drawn(*own["lora_B"].shape, seed=4))
        before = [own["lora_B"].detach().clone() for own in tensors]
        optimizer = OPTIMIZERS["adamw"](trained(compiled))
        NestedRanks(compiled, optimizer, ranks=(rank,), frozen=frozen)
        compiled(drawn(5, 9, seed=3)).square().sum().backward()
        optimizer.step()
        moved = [int((own["lora_B"] != then).any(dim=0).sum()) for own, then in zip(tensors, before, strict=True)]
        assert tuple(moved) == expected


def test_an_adapter_that_is_off_stays() -> None:
    variant = lorac.DyLoRA(r=R, targets=("site",))
    compiled = lorac.compile(linear(9, 8), {"a": variant, "b": variant}, active="a").train()
    optimizer = OPTIMIZERS["adamw"](trained(compiled))
    NestedRanks(compiled, optimizer, frozen=False)
    a, b = (compiled.adapters[name].tensors["site"]["lora_A"] for name in "ab")
    before = a.detach().clone(), b.detach().clone()
    for seed in range(2):  # B starts at 0, and A has no gradient until it moved
        step(compiled, optimizer, seed)
    assert not torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_a_run_resumes_exactly() -> None:
    """Weights, components' states and draws, through the optimizer's state dict and a file-like copy of it."""
    compiled, a, b = started()
    optimizer = OPTIMIZERS["adamw"](trained(compiled))
    NestedRanks(compiled, optimizer, generator=seeded())
    for seed in range(6):
        step(compiled, optimizer, seed)
    saved, at = copy.deepcopy(optimizer.state_dict()), (a.detach().clone(), b.detach().clone())
    resumed, again_a, again_b = compiled_with(*at)
    other = OPTIMIZERS["adamw"](trained(resumed))
    NestedRanks(resumed, other, generator=seeded(9))
    other.load_state_dict(saved)
    for seed in range(6, 12):
        step(compiled, optimizer, seed)
        step(resumed, other, seed)
    assert torch.equal(again_a, a) and torch.equal(again_b, b)


def test_afterwards_training_goes_on_as_usual() -> None:
    """The state is one tensor's again: zero where a component never moved, and the largest count of steps."""
    compiled, a, b = started()
    optimizer = OPTIMIZERS["adamw"](trained(compiled))
    with NestedRanks(compiled, optimizer, ranks=(2,)) as rule:
        for seed in range(3):
            step(compiled, optimizer, seed)
    state = optimizer.state[a]
    assert state["step"].shape == () and state["step"] == 3
    assert state["exp_avg"].any(dim=1).tolist() == [False, True, False, False]
    assert optimizer.state[b]["exp_avg"].shape == b.shape
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
    assert "nested_ranks" not in optimizer.state_dict()
    before = a.detach().clone()
    step(compiled, optimizer)
    assert a.grad.all() and (a != before).all()
    moment = optimizer.state[a]["exp_avg"].clone()
    rule.remove()
    assert torch.equal(optimizer.state[a]["exp_avg"], moment)


def test_a_failed_step_restores_the_tensors() -> None:
    compiled, a, b = started()
    optimizer = OPTIMIZERS["adamw"](trained(compiled))
    NestedRanks(compiled, optimizer, ranks=(2,))
    optimizer.param_groups[0]["lr"] = None
    with pytest.raises(TypeError):
        step(compiled, optimizer)
    optimizer.param_groups[0]["lr"] = 1e-2
    before = a.detach().clone()
    step(compiled, optimizer)
    assert (a != before).all(dim=1).tolist() == [False, True, False, False]
    assert [id(tensor) for tensor in optimizer.param_groups[0]["params"]] == [id(a), id(b)]


def nested(**options: Any) -> tuple[Any, Any, NestedRanks]:
    """A small BERT with DyLoRA, AdamW and the rule."""
    compiled = lorac.compile(host("tiny_bert"), {"a": lorac.DyLoRA(r=4, alpha=8, targets=TARGETS["tiny_bert"])})
    optimizer = torch.optim.AdamW(trained(compiled), lr=2e-2)
    return compiled, optimizer, NestedRanks(compiled, optimizer, generator=seeded(), **options)


@pytest.mark.medium("frozen factors", cases=["all"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "all"])
def test_learns_at_every_rank(frozen: bool) -> None:
    compiled, optimizer, rule = nested(frozen=frozen)
    batches = data("tiny_bert", 24, distinct=False)

    @torch.no_grad()
    def losses() -> list[float]:
        choices = [{"a": lorac.Active(rank=b)} for b in (1, 2, 3, 4)]
        return [float(compiled(**batches[0], adapters=choice).loss) for choice in choices]

    before = losses()
    plain_loop(compiled, batches, optimizer=optimizer)
    rule.remove()
    assert all(after <= 0.95 * then for after, then in zip(losses(), before, strict=True)), losses()


@pytest.mark.slow("test_every_rule.py has Trainer run one")
def test_trainer_runs_the_rule(tmp_path: Path) -> None:
    compiled, optimizer, _ = nested(ranks=(3,))
    before = {path: at["lora_A"].detach().clone() for path, at in compiled.adapters["a"].tensors.items()}
    losses = by_trainer(compiled, data("tiny_bert", 10, distinct=False), tmp_path, optimizer=optimizer)
    assert losses[-1] < losses[0], losses
    for path, at in compiled.adapters["a"].tensors.items():
        assert (at["lora_A"] != before[path]).any(dim=1).tolist() == [False, False, True, False]


def test_accelerates_wrapper_is_seen_through() -> None:
    from accelerate import Accelerator

    compiled, a, b = started()
    wrapped = Accelerator(cpu=True).prepare(OPTIMIZERS["adamw"](trained(compiled)))
    NestedRanks(compiled, wrapped, ranks=(3,))
    before = others(a, b, 3)
    step(compiled, wrapped)
    assert all(map(torch.equal, others(a, b, 3), before))


def test_clipping_uses_the_trained_components() -> None:
    compiled, a, b = started()
    NestedRanks(compiled, torch.optim.SGD(trained(compiled), lr=1), ranks=(2,))
    compiled(drawn(5, 9, seed=3)).square().sum().backward()
    norm = torch.nn.utils.get_total_norm([a.grad, b.grad])
    assert norm == torch.nn.utils.get_total_norm([a.grad[1], b.grad[:, 1]]) > 0


def test_rejects_ranks_and_adapters_that_do_not_fit() -> None:
    compiled, a, _ = started()
    optimizer = torch.optim.SGD(trained(compiled), lr=1)
    with pytest.raises(lorac.ChoiceError, match="no layer has rank 5") as error:
        NestedRanks(compiled, optimizer, ranks=range(2, 6))
    assert error.value.nearest == "1 to 4"
    with pytest.raises(lorac.ChoiceError, match="ranks= is empty"):
        NestedRanks(compiled, optimizer, ranks=())
    for weights in ((1, 2), (1, 1, 1, -1), (0, 0, 0, 0)):
        with pytest.raises(lorac.ChoiceError, match="is not a distribution over 4 ranks"):
            NestedRanks(compiled, optimizer, weights=weights)
    with pytest.raises(lorac.ChoiceError, match="does not hold lora_B"):
        NestedRanks(compiled, torch.optim.SGD([a], lr=1))
    lora = lorac.compile(linear(9, 8), {"b": lorac.LoRA(r=2, targets=("site",))})
    with pytest.raises(lorac.AdapterNotFound, match=r"of method dylora; there is 'b' \(lora\)"):
        NestedRanks(lora, torch.optim.SGD(trained(lora), lr=1))
    with NestedRanks(compiled, optimizer), pytest.raises(lorac.Unavailable, match="without a closure"):
        optimizer.step(lambda: 0.0)
