"""GaLore: the specification's values by hand, subspaces and their sizes, the authors' release, and the adapter."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from lorac.training import GaLoreAdamW, GaLoreSGD, galore_groups
from tests.limits import assert_apart, rank_of
from tests.training.loops import trained
from tests.training.rules import drawn, linear, tensor

SIDES = ("std", "reverse_std", "left", "right", "full")


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(drawn(*shape, seed=seed).to(dtype))


def projected(*tensors: Any, **settings: Any) -> list[dict[str, Any]]:
    return [{"params": list(tensors), **{"rank": 2, "update_proj_gap": 3, "scale": 0.25, **settings}}]


def run(optimizer: Any, weight: Tensor, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def test_the_example_by_hand() -> None:
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    optimizer = GaLoreAdamW(projected(weight, rank=1), lr=0.01, eps=0.0)
    run(optimizer, weight, [tensor([[3, 0], [0, 1], [0, 0]])]).nan_to_num_()
    assert_close(weight.detach(), tensor([[-0.0025, 0], [0, 0], [0, 0]]))
    assert torch.equal(optimizer.state[weight]["projector"]["right"].abs(), tensor([[1, 0]]))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (2, 5, 3)], ids=str)
def test_projections_are_the_best_of_their_rank(shape: tuple[int, ...]) -> None:
    """Orthonormal; at a refresh ‖G − back(R)‖² is what singular values are left out; the sides are the release's."""
    weight, gradient = parameter(*shape), drawn(*shape, seed=1)
    for side in SIDES:
        optimizer = GaLoreSGD(projected(weight, proj_type=side, scale=1.0), lr=1.0)
        before = weight.detach().clone()
        moved = before - run(optimizer, weight, [gradient])
        left_out = torch.linalg.svdvals(gradient)[..., 2:].square().sum()
        assert_close((gradient - moved).square().sum(), left_out)
        projector = optimizer.state[weight]["projector"]
        tall = shape[-2] >= shape[-1]
        expected = {"std": {"right"} if tall else {"left"}, "reverse_std": {"left"} if tall else {"right"}}
        assert projector.keys() == expected.get(side, {"left", "right"} if side == "full" else {side})
        for name, vectors in projector.items():
            own = vectors.mT @ vectors if name == "left" else vectors @ vectors.mT
            assert_close(own, torch.eye(2).double().expand(own.shape))


def test_a_full_rank_is_sgd_itself() -> None:
    gradients = [drawn(5, 3, seed=t) for t in range(5)]
    weight, other = parameter(5, 3), parameter(5, 3)
    for momentum in (0.0, 0.9):
        mine = GaLoreSGD(projected(weight, rank=9, scale=1.0, update_proj_gap=100), lr=0.1, momentum=momentum)
        plain = torch.optim.SGD([other], lr=0.1, momentum=momentum)
        assert_close(run(mine, weight, gradients), run(plain, other, gradients))
    adam = GaLoreAdamW(projected(weight, rank=9, scale=1.0), lr=0.1)
    assert_apart(
        run(adam, weight, gradients), run(torch.optim.AdamW([other], lr=0.1, weight_decay=0), other, gradients)
    )


def test_the_rank_grows_with_the_periods() -> None:
    weight = parameter(8, 7)
    start = weight.detach().clone()
    optimizer = GaLoreAdamW(projected(weight), lr=0.1)
    for period in (1, 2, 3):
        run(optimizer, weight, [drawn(8, 7, seed=10 * period + t) for t in range(3)])
        assert rank_of(weight.detach() - start) == 2 * period


@pytest.mark.parametrize("side", SIDES)
def test_the_state_has_the_documented_size(side: str) -> None:
    m, n, r = 3, 5, 2
    weight = parameter(m, n)
    optimizer = GaLoreAdamW(projected(weight, proj_type=side), lr=0.1)
    run(optimizer, weight, [drawn(m, n, seed=1)])
    state = optimizer.state[weight]
    kept = [*state["projector"].values(), state["exp_avg"], state["exp_avg_sq"]]
    one = {"left": 2 * r * n + m * r, "right": 2 * m * r + r * n, "full": 2 * r * r + m * r + r * n}
    assert sum(value.numel() for value in kept) == one[{"std": "left", "reverse_std": "right"}.get(side, side)]


def restated(weight: Tensor, gradients: list[Tensor], *, rank: int, gap: int, scale: float, lr: float) -> Tensor:
    """The specification's update with AdamW and decay 0.1, for ``std`` on a wide matrix."""
    mean = square = None
    for t, gradient in enumerate(gradients):
        if t % gap == 0:
            projector = torch.linalg.svd(gradient, full_matrices=False)[0][:, :rank]
        small = projector.t() @ gradient
        mean = 0.1 * small if mean is None else 0.9 * mean + 0.1 * small
        square = 0.001 * small**2 if square is None else 0.999 * square + 0.001 * small**2
        rate = lr * (1 - 0.999 ** (t + 1)) ** 0.5 / (1 - 0.9 ** (t + 1))
        weight = weight - rate * scale * projector @ (mean / (square.sqrt() + 1e-6))
        weight = weight - lr * 0.1 * weight
    return weight


def test_matches_the_papers_update() -> None:
    weight, gradients = parameter(4, 6), [drawn(4, 6, seed=t) for t in range(8)]
    expected = restated(weight.detach().clone(), gradients, rank=2, gap=3, scale=0.25, lr=0.1)
    assert_close(run(GaLoreAdamW(projected(weight), lr=0.1, weight_decay=0.1), weight, gradients), expected)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_matches_the_released_optimizer(shape: tuple[int, int], side: str) -> None:
    """Against ``galore-torch`` in float32, where it is installed: its AdamW alone, which needs no bitsandbytes."""
    found = importlib.util.find_spec("galore_torch")
    if found is None or found.origin is None:
        pytest.skip("galore-torch is not installed")
    package = types.ModuleType("galore_torch")
    package.__path__ = [str(Path(found.origin).parent)]
    sys.modules["galore_torch"] = package
    try:
        released = importlib.import_module("galore_torch.adamw")
    finally:
        del sys.modules["galore_torch"]
    weight, other = (parameter(*shape, dtype=torch.float32) for _ in range(2))
    groups = (projected(one, rank=4, proj_type=side) for one in (weight, other))
    mine = GaLoreAdamW(next(groups), lr=0.01, weight_decay=0.1)
    theirs = released.AdamW(next(groups), lr=0.01, weight_decay=0.1, no_deprecation_warning=True)
    gradients = [drawn(*shape, seed=t).float() for t in range(10)]
    assert_close(run(mine, weight, gradients), run(theirs, other, gradients))


def host() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def adapted() -> tuple[Any, dict[str, Tensor]]:
    compiled: Any = lorac.compile(host(), {"a": lorac.Full(targets=["0", "2"], bias="all")})
    return compiled.train(), compiled.adapters["a"].tensors


def step(compiled: Any, optimizer: Any, seed: int) -> None:
    optimizer.zero_grad()
    (compiled(drawn(7, 6, seed=seed)) - drawn(7, 4, seed=50 + seed)).square().mean().backward()
    optimizer.step()


def test_trains_full_weights_into_an_adapter(tmp_path: Path) -> None:
    compiled, _ = adapted()
    groups = galore_groups(compiled, rank=2, update_proj_gap=2)
    assert [len(group["params"]) for group in groups] == [2, 2] and "rank" not in groups[1]
    optimizer = GaLoreAdamW(groups, lr=0.05)
    for seed in range(4):
        step(compiled, optimizer, seed)
    x = drawn(3, 6, seed=9)
    base, answer = compiled(x, adapters=None).detach(), compiled.eval()(x).detach()
    assert_apart(answer, base)
    lorac.save_adapter(compiled.adapters["a"], tmp_path / "a.safetensors", format="native")
    again = lorac.compile(host(), lorac.load_adapter(tmp_path / "a.safetensors"))
    assert_close(again(x).detach(), answer)
    again.swap(None)
    assert torch.equal(again(x).detach(), base)
    small = lorac.to_lora(compiled.adapters["a"], host(), rank=3)
    assert small.tensors["0"]["lora_A"].shape == (3, 6)


def test_steps_by_layer_are_the_same_steps() -> None:
    whole, parts = adapted(), adapted()
    optimizers = [GaLoreAdamW(galore_groups(one, rank=2, update_proj_gap=2), lr=0.05) for one, _ in (whole, parts)]
    for seed in range(5):
        step(whole[0], optimizers[0], seed)
        with optimizers[1].by_layer():
            step(parts[0], optimizers[1], seed)
        assert all(tensor.grad is None for tensor in trained(parts[0]))
    for path in ("0", "2"):
        assert torch.equal(whole[1][path]["weight"], parts[1][path]["weight"])
    before = parts[1]["0"]["weight"].detach().clone()
    (parts[0](drawn(7, 6, seed=1))).sum().backward()
    assert torch.equal(before, parts[1]["0"]["weight"]) and parts[1]["0"]["weight"].grad is not None


@pytest.mark.slow
def test_moments_of_eight_bits() -> None:
    """Where bitsandbytes is installed: a quarter of the bytes, near the same path, resumed to the bit."""
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    gradients = [drawn(96, 128, seed=t).float() for t in range(6)]
    start = parameter(96, 128, dtype=torch.float32)
    paths = {}
    for bits in (32, 8):
        weight = copy.deepcopy(start)
        optimizer = GaLoreAdamW(projected(weight, rank=64), lr=0.01, bits=bits)
        run(optimizer, weight, gradients[:4])
        saved, middle = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(weight)
        paths[bits] = run(optimizer, weight, gradients[4:]) - start.detach()
        other = GaLoreAdamW(projected(middle, rank=64), lr=0.01, bits=bits)
        other.load_state_dict(saved)
        assert torch.equal(run(other, middle, gradients[4:]), weight)
    kept = optimizer.state[weight]["exp_avg"]
    assert kept["codes"].dtype == torch.uint8 and kept["codes"].numel() == 64 * 128
    assert kept["largest"].numel() == 64 * 128 // 256
    distance = torch.linalg.vector_norm(paths[8] - paths[32]) / torch.linalg.vector_norm(paths[32])
    assert 0 < distance <= 0.1, float(distance)


def test_rejects_invalid_settings() -> None:
    weight = parameter(4, 3)
    for wrong in ({"rank": 0}, {"update_proj_gap": 0}, {"scale": -1.0}):
        with pytest.raises(lorac.ChoiceError, match="GaLore does not take"):
            GaLoreAdamW(projected(weight, **wrong))
    with pytest.raises(lorac.OptionError, match="no proj_type 'stdd'") as error:
        GaLoreSGD(projected(weight, proj_type="stdd"))
    assert error.value.nearest == "std"
    with pytest.raises(lorac.ChoiceError, match=r"shape \(3,\) has no singular vectors"):
        GaLoreAdamW(projected(parameter(3)))
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"bits": 4}):
        with pytest.raises(lorac.ChoiceError):
            GaLoreAdamW([weight], **wrong)
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(lorac.MissingExtra, match="bitsandbytes is not installed"):
            GaLoreAdamW([weight], bits=8)
    compiled = lorac.compile(linear(4, 3), {"a": lorac.LoRA(r=2, targets=("site",))})
    with pytest.raises(lorac.AdapterNotFound, match="of method full"):
        galore_groups(compiled)
