"""SoRA's rule: both proximal maps, gates that close, stay exactly closed and open again, and the pruned adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.testing import assert_close
from lorac.training import ProximalGates, gate_penalty, prune_gates, soft_threshold, sora_code_threshold, thresholds
from tests.limits import assert_apart
from tests.training.loops import TARGETS, by_trainer, data, host, plain_loop, trained
from tests.training.rules import drawn, linear

G = [0.05, 0.1, 0.15, 0.2, 0.25, -0.12, -0.31]


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gates_only(tensors: dict[str, Tensor], x: Tensor, **sites: Any) -> tuple[Any, Tensor]:
    """A compiled layer of which only the gates train, and these."""
    variant = lorac.SoRA(r=len(tensors["gate"]), alpha=len(tensors["gate"]), targets=("site",))  # s = 1
    model = linear(x.shape[1], len(tensors["lora_B"]))
    compiled = lorac.compile(model, {"a": lorac.Adapter("a", variant, {"site": tensors})}).train()
    own = compiled.adapters["a"].tensors["site"]
    for name in ("lora_A", "lora_B"):
        own[name].requires_grad_(False)
    return compiled, own["gate"]


def descend(compiled: Any, gate: Tensor, x: Tensor, target: Tensor, *, xi: float, eta: float, steps: int) -> Tensor:
    """Plain SGD with the rule on the half squared error; the gradient at the last iterate."""
    optimizer = torch.optim.SGD([gate], lr=eta)
    with ProximalGates(compiled, optimizer, threshold=xi):
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * (compiled(x) - target).square().sum()).backward()
            optimizer.step()
    optimizer.zero_grad()
    (0.5 * (compiled(x) - target).square().sum()).backward()
    assert gate.grad is not None
    return gate.grad


def test_maps_by_hand() -> None:
    soft, code = soft_threshold(tensor(G), 0.1), sora_code_threshold(tensor(G), 0.1)
    assert_close(soft, tensor([0, 0, 0.05, 0.1, 0.15, -0.02, -0.21]))
    assert_close(code, tensor([0, 0.1, 0, 0.1, 0.15, 0, -0.21]))
    assert (soft == 0).tolist() == [True, True, False, False, False, False, False]
    assert (code == 0).tolist() == [True, False, True, False, False, True, False]


@pytest.mark.parametrize(("prox", "expected"), [("soft", soft_threshold), ("sora_code", sora_code_threshold)])
def test_a_step_is_the_optimizers_and_then_the_map(prox: str, expected: Any) -> None:
    tensors = {"lora_A": drawn(7, 5, seed=1), "lora_B": drawn(4, 7, seed=2), "gate": tensor(G)}
    x, eta = drawn(3, 5, seed=3), 1e-3
    compiled, gate = gates_only(tensors, x)
    optimizer = torch.optim.SGD([gate], lr=eta)
    rule = ProximalGates(compiled, optimizer, threshold=0.1, prox=prox)
    for xi in (0.1, 0.03):
        rule.threshold = xi
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        before = gate.detach() - eta * gate.grad
        optimizer.step()
        assert_close(gate.detach(), expected(before, xi))
    rule.remove()
    before = gate.detach() - eta * gate.grad
    optimizer.step()
    assert_close(gate.detach(), before)


def test_a_fixed_point_is_optimal() -> None:
    """Where g_i = 0, |∇L_i| ≤ ξ/η; elsewhere ∇L_i = −sign(g_i)·ξ/η."""
    tensors = {"lora_A": drawn(6, 8, seed=1), "lora_B": drawn(7, 6, seed=2), "gate": torch.ones(6).double()}
    x, xi, eta = torch.eye(8, dtype=torch.float64), 0.04, 4e-3
    compiled, gate = gates_only(tensors, x)
    wanted = tensors["lora_B"] * tensor([1.5, -1, 0.02, 0, -0.01, 0.5]) @ tensors["lora_A"]
    target = x @ (compiled.session.base.weight(compiled.sites["site"]) + wanted).T
    grad = descend(compiled, gate, x, target, xi=xi, eta=eta, steps=300)
    closed = gate.detach() == 0
    assert 0 < closed.sum() < 6
    assert (grad[closed].abs() <= xi / eta).all()
    assert not torch.equal(grad[closed], torch.zeros_like(grad[closed]))
    left = gate.detach()[~closed]
    assert_close(grad[~closed], -left.sign() * xi / eta)


def test_more_threshold_leaves_no_more_gates() -> None:
    """A = B = I: the gates are apart, L = ½·Σ(g − w)², and of each is left w shrunk by ξ/η."""
    w, x, eta = tensor([0.9, -0.7, 0.5, -0.3, 0.1]), torch.eye(5, dtype=torch.float64), 0.5
    counts = []
    for xi in (0.0, 0.1, 0.2, 0.3, 0.5):
        tensors = {"lora_A": x.clone(), "lora_B": x.clone(), "gate": torch.ones(5).double()}
        compiled, gate = gates_only(tensors, x)
        target = x @ (compiled.session.base.weight(compiled.sites["site"]) + w.diag()).T
        descend(compiled, gate, x, target, xi=xi, eta=eta, steps=60)
        assert_close(gate.detach(), w.sign() * (w.abs() - xi / eta).clamp(min=0))
        counts.append(int(gate.count_nonzero()))
    assert counts == [5, 4, 3, 2, 0]


def test_a_closed_gate_opens_again() -> None:
    """A = B = I, x = I, η = 0.5: a step carries gate 1 to 0.15, beyond ξ = 0.1, and gate 2 to 0.05, not beyond."""
    x = torch.eye(2, dtype=torch.float64)
    compiled, gate = gates_only({"lora_A": x.clone(), "lora_B": x.clone(), "gate": torch.zeros(2).double()}, x)
    optimizer = torch.optim.SGD([gate], lr=0.5)
    ProximalGates(compiled, optimizer, threshold=0.1)
    w = compiled.session.base.weight(compiled.sites["site"])
    (0.5 * (compiled(x) - x @ (w + tensor([0.3, 0.1]).diag()).T).square().sum()).backward()
    optimizer.step()
    assert_close(gate.detach(), tensor([0.05, 0]))
    assert gate[1] == 0


def test_gates_that_took_no_step_stay() -> None:
    """Those of an adapter that is off do not shrink while another trains."""
    model, x = linear(5, 4), drawn(3, 5, seed=3)
    variant = lorac.SoRA(r=3, targets=("site",))
    compiled = lorac.compile(model, {"a": variant, "b": variant}, active="a").train()
    before = [compiled.adapters[name].tensors["site"]["gate"].detach().clone() for name in "ab"]
    optimizer = torch.optim.AdamW(trained(compiled), lr=1e-2)
    with ProximalGates(compiled, optimizer, threshold=0.1):
        compiled(x).square().sum().backward()
        optimizer.step()
    same = [torch.equal(compiled.adapters[n].tensors["site"]["gate"], g) for n, g in zip("ab", before, strict=True)]
    assert same == [False, True]


def test_penalty_by_hand() -> None:
    """λ₁ = 10 and 5 gates of two layers, |g| summing to 3: 6; its gradient is ±2, and 0 where a gate is closed."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 5)).double()
    variant = lorac.SoRA(r=3, rank_pattern={"1": 2}, targets=("0", "1"))
    compiled = lorac.compile(model, {"a": variant, "b": variant}, active="a")
    first, second = (compiled.adapters["a"].tensors[path]["gate"] for path in "01")
    first.data.copy_(tensor([1, -0.5, 0]))
    second.data.copy_(tensor([-1.25, 0.25]))
    loss = gate_penalty(compiled, 10)
    assert loss.item() == 6
    loss.backward()
    assert (first.grad.tolist(), second.grad.tolist()) == ([2, -2, 0], [-2, 2])
    compiled.swap(None)
    with pytest.raises(lorac.ChoiceError, match="no sora adapter is active"):
        gate_penalty(compiled, 10)


def test_thresholds_of_the_scheduler() -> None:
    ends = (math.log(2), math.log(8))
    assert_close(tensor(thresholds(0, 6e-4, 4)), tensor([0, 2e-4, 4e-4, 6e-4]))
    assert_close(tensor(thresholds(*ends, 3, "log_linear")), tensor([math.log(2), math.log(5), math.log(8)]))
    assert_close(tensor(thresholds(1e-4, 4e-4, 3, "exp_linear")), tensor([1e-4, 2e-4, 4e-4]))
    with pytest.raises(lorac.OptionError, match="no spacing 'linea'") as error:
        thresholds(0, 1, 2, "linea")
    assert error.value.nearest == "linear"
    with pytest.raises(lorac.ChoiceError, match="no geometric spacing begins at 0"):
        thresholds(0, 1, 2, "exp_linear")
    with pytest.raises(lorac.ChoiceError, match="no 2 thresholds go from 1 to 0"):
        thresholds(1, 0, 2)


def test_pruned_by_hand() -> None:
    """r = 2, α = 4, g = [.5, 0]: rank 1, α' = 2, A' = [[.5, 0]], B' = [[1], [2]]; x = [1, 2] gives [1, 2]."""
    p = {"lora_A": tensor([[1, 0], [0, 1]]), "lora_B": tensor([[1, 1], [2, -1]]), "gate": tensor([0.5, 0])}
    small = prune_gates(lorac.Adapter("a", lorac.SoRA(r=2, alpha=4, targets=("site",)), {"site": p}), "small")
    assert (small.name, small.variant.r, small.variant.alpha, small.variant.targets) == ("small", 1, 2, ("site",))
    assert small.tensors["site"]["lora_A"].tolist() == [[0.5, 0]]
    assert small.tensors["site"]["lora_B"].tolist() == [[1], [2]]
    model = linear(2, 2)
    model.site.weight.data.zero_()
    with torch.no_grad():
        assert lorac.compile(model, {"a": small})(tensor([[1, 2]])).tolist() == [[1, 2]]


@torch.no_grad()
def test_every_site_is_pruned_for_itself(tmp_path: Path) -> None:
    """One site's path ends another's; one site closes whole; r and alpha differ to begin with. PEFT's file says so."""
    model = torch.nn.Sequential()
    for path in ("q", "k"):
        model.add_module(path, torch.nn.Linear(8, 8, dtype=torch.float64))
    model.add_module("deep", torch.nn.Sequential())
    model.deep.add_module("q", torch.nn.Linear(8, 8, dtype=torch.float64))
    variant = lorac.SoRA(r=3, alpha=6, rank_pattern={"deep.q": 4}, alpha_pattern={"deep.q": 5}, targets=("q", "k"))
    adapter = lorac.compile(model, {"a": variant}).adapters["a"]
    for seed, at in enumerate(adapter.tensors.values()):
        at["lora_B"].copy_(drawn(*at["lora_B"].shape, seed=seed))
    adapter.tensors["q"]["gate"][1:] = 0
    adapter.tensors["k"]["gate"].zero_()
    adapter.tensors["deep.q"]["gate"][2] = 0
    small = prune_gates(adapter)
    assert small.sites == ("q", "deep.q")
    assert (small.variant.r, small.variant.alpha) == (3, 3.75)
    assert small.variant.rank_pattern == {"^q": 1} and small.variant.alpha_pattern == {"^q": 2}
    lorac.save_adapter(small, tmp_path, format="peft", model=model)
    x = drawn(3, 8, seed=0)
    whole, cut, read = (lorac.compile(model, {"a": one})(x) for one in (adapter, small, tmp_path))
    assert_close(cut, whole)
    assert torch.equal(read, cut)
    assert_apart(whole, model(x))
    for at in adapter.tensors.values():
        at["gate"].zero_()
    with pytest.raises(lorac.AdapterError, match="every gate of 'a' is closed"):
        prune_gates(adapter)


def sora(threshold: float) -> tuple[Any, Any, ProximalGates]:
    """A small Llama with SoRA, AdamW with the gates in a group of their own, and the rule."""
    model = host("tiny_llama").double()
    compiled = lorac.compile(model, {"a": lorac.SoRA(r=6, targets=TARGETS["tiny_llama"])})
    gates = [at["gate"] for at in compiled.adapters["a"].tensors.values()]
    others = [p for p in trained(compiled) if all(p is not gate for gate in gates)]
    groups = [{"params": others, "weight_decay": 0.1}, {"params": gates, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return compiled, optimizer, ProximalGates(compiled, optimizer, threshold=threshold)


def test_training_closes_gates_that_pruning_drops() -> None:
    compiled, optimizer, _ = sora(0.06)
    batches = data("tiny_llama", 12, distinct=False)
    losses = plain_loop(compiled, batches, optimizer=optimizer)
    assert losses[-1] <= 0.9 * losses[0], losses
    adapter = compiled.adapters["a"]
    left = {path: int(at["gate"].count_nonzero()) for path, at in adapter.tensors.items()}
    assert 0 < sum(left.values()) < 6 * len(left)
    assert len(set(left.values())) > 1
    small = lorac.compile(host("tiny_llama").double(), {"a": prune_gates(adapter)})
    assert {path: value.rank for path, value in small.pool["a"].changes.items()} == {
        path: n for path, n in left.items() if n
    }
    with torch.no_grad():
        assert_close(small(**batches[0]).logits, compiled(**batches[0]).logits)


@pytest.mark.slow("test_every_rule.py has Trainer run one")
def test_trainer_runs_the_rule(tmp_path: Path) -> None:
    compiled, optimizer, _ = sora(0.06)
    losses = by_trainer(compiled, data("tiny_llama", 8, distinct=False), tmp_path, optimizer=optimizer)
    assert losses[-1] < losses[0], losses
    assert any((at["gate"] == 0).any() for at in compiled.adapters["a"].tensors.values())


def test_rejects_incomplete_optimizers_and_other_methods() -> None:
    model, x = linear(5, 4), drawn(3, 5, seed=3)
    compiled = lorac.compile(model, {"a": lorac.SoRA(r=2, targets=("site",))})
    everything = torch.optim.SGD(trained(compiled), lr=1)
    gate = compiled.adapters["a"].tensors["site"]["gate"]
    with pytest.raises(lorac.ChoiceError, match="does not hold gate of 'a' at 'site'"):
        ProximalGates(compiled, torch.optim.SGD([p for p in trained(compiled) if p is not gate], lr=1))
    with pytest.raises(lorac.OptionError, match="no proximal map 'sora'") as error:
        ProximalGates(compiled, everything, prox="sora")
    assert error.value.nearest == "sora_code"
    for xi in (-0.1, math.inf, math.nan):
        with pytest.raises(lorac.ChoiceError, match="closes no gates"):
            ProximalGates(compiled, everything, threshold=xi)
    lora = lorac.compile(model, {"b": lorac.LoRA(r=2, targets=("site",))})
    with pytest.raises(lorac.AdapterNotFound, match=r"of method sora; there is 'b' \(lora\)"):
        ProximalGates(lora, torch.optim.SGD(trained(lora), lr=1))
    with pytest.raises(lorac.AdapterNotFound, match="'b' is lora, which has no gates"):
        prune_gates(lora.adapters["b"])
    engine = lorac.compile(model.float(), {"a": compiled.adapters["a"]}, "onnxruntime", example_inputs=(x.float(),))
    with pytest.raises(lorac.Unavailable, match="target 'onnxruntime' does not train"):
        ProximalGates(engine, everything)
    with pytest.raises(lorac.Unavailable, match=r"Sequential, which lorac\.compile did not return, does not train"):
        ProximalGates(model, everything)
    baked = lorac.compile(model, {"a": compiled.adapters["a"]}, mode="baked", active="a")
    with pytest.raises(lorac.Unavailable, match="baked"):
        ProximalGates(baked, everything)
