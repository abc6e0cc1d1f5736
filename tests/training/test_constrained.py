"""Methods that bound their tensors: training writes the bounded values, from which the optimizer goes on, as PEFT's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lorac
from lorac.testing import assert_close
from tests.training.loops import trained
from tests.training.rules import drawn

STEPS = 20
OPTIMIZERS = {
    "sgd": lambda tensors: torch.optim.SGD(tensors, lr=0.5, momentum=0.5),
    "adamw": lambda tensors: torch.optim.AdamW(tensors, lr=0.1),
}
FIELDS: dict[str, Any] = {"targets": ("0",), "block_size": 4, "coft": True, "eps": 0.25}


def host() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def step(net: Any, optimizer: Any, seed: int, *, parts: int = 1) -> torch.Tensor:
    optimizer.zero_grad()
    x, y = drawn(4, 16, seed=seed), 3 * drawn(4, 4, seed=100 + seed)
    outputs = [net(rows) for rows in x.chunk(parts)]
    for output, rows in zip(outputs, y.chunk(parts), strict=True):
        ((output - rows).square().mean() / parts).backward()
    optimizer.step()
    return torch.cat(outputs).detach()


@pytest.mark.medium("each once", keep=["False-adamw", "True-sgd"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("share", [False, True])
def test_coft_trains_as_in_peft(share: bool, optimizer: str) -> None:
    """One or four blocks: PEFT computes eps/√blocks in float32, in which it is exact."""
    import peft

    config = peft.OFTConfig(
        r=0, oft_block_size=4, target_modules=["0"], coft=True, eps=0.25, block_share=share, use_cayley_neumann=False
    )
    theirs: Any = peft.get_peft_model(copy.deepcopy(host()), config).double()
    variant = lorac.OFT(**FIELDS, block_share=share, use_cayley_neumann=False)
    compiled: Any = lorac.compile(host(), {"a": variant}).train()  # type: ignore[attr-defined]  # in eager it is a module
    mine, other = OPTIMIZERS[optimizer](trained(compiled)), OPTIMIZERS[optimizer](trained(theirs))
    for seed in range(STEPS):
        assert_close(step(compiled, mine, seed), step(theirs, other, seed))
    stored = compiled.adapters["a"].tensors["0"]["oft_R"]
    assert stored.norm(dim=1).max() > 0.25 / (2 * len(stored)) ** 0.5, "the bound has never acted"
    with torch.no_grad():
        assert_close(compiled.eval()(drawn(4, 16, seed=7)), theirs(drawn(4, 16, seed=7)))


def test_several_calls_per_step_project_once() -> None:
    """The second call of a step finds what the first one wrote, and leaves the first one's graph valid."""
    one, other = (lorac.compile(host(), {"a": lorac.OFT(**FIELDS)}).train() for _ in range(2))  # type: ignore[attr-defined]
    optimizers = [OPTIMIZERS["sgd"](trained(net)) for net in (one, other)]
    for seed in range(5):
        assert_close(step(one, optimizers[0], seed, parts=2), step(other, optimizers[1], seed))
    stored = one.adapters["a"].tensors["0"]["oft_R"]
    one(drawn(4, 16, seed=1))
    version = stored._version
    one(drawn(4, 16, seed=1))
    assert stored._version == version
    with torch.no_grad():
        stored.mul_(2)
        one.eval()(drawn(4, 16, seed=1))
        assert stored._version == version + 1, "a call without gradients has written"


def test_a_bound_holds_inside_other_methods() -> None:
    own: Any = {key: value for key, value in FIELDS.items() if key != "targets"}
    chain = lorac.Chain(parts=(lorac.OFT(**own),), targets=("0",))
    split = lorac.Split(parts={"q": lorac.OFT(**own)}, among=("q",), targets=("0",))
    for variant in (chain, split):
        compiled: Any = lorac.compile(host(), {"a": variant}).train()  # type: ignore[attr-defined]
        reference: Any = lorac.compile(host(), {"a": lorac.OFT(**FIELDS)}).train()  # type: ignore[attr-defined]
        optimizers = [OPTIMIZERS["sgd"](trained(net)) for net in (compiled, reference)]
        for seed in range(4):
            found, expected = step(compiled, optimizers[0], seed), step(reference, optimizers[1], seed)
            assert_close(found, expected)
