"""A model is run on a copy: its writes and random draws leave no trace in it or in the process."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorac.frontend.model_runner import ModelRunner, WeightWritten, preserve_random_state
from lorac.ir.calls.call import Call


class Writer(nn.Module):
    """Writes in every way into what its forward is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.table = torch.ones(2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, what: str = "") -> Tensor:
        weight = self.linear.weight
        if what == "view":
            weight[0].t().mul_(2)
        elif what == "data":
            weight.data.mul_(2)
        elif what == "out":
            torch.mul(weight, 2, out=weight)
        elif what == "attribute":
            self.table.add_(1)
        elif what == "many":
            torch._foreach_mul_([weight], 2.0)
        elif what == "caught":
            self._try(weight)
        elif what == "buffer":
            self.seen += 1
        return self.linear(x)

    def _try(self, weight: Tensor) -> None:
        try:
            weight.data.zero_()
        except Exception as error:
            raise ValueError("something else") from error


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("view", "linear.weight"),
        ("data", "linear.weight"),
        ("out", "linear.weight"),
        ("many", "linear.weight"),
        ("caught", "linear.weight"),
        ("attribute", "table"),
    ],
)
def test_a_write_into_a_weight_is_named_and_not_done(what: str, name: str):
    host = Writer().train()
    before = {key: value.clone() for key, value in host.state_dict().items()}
    versions = [(parameter, parameter._version) for parameter in host.parameters()]
    with pytest.raises(WeightWritten, match=name):
        ModelRunner(host).run(Call((torch.ones(1, 3), what)))
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items())
    assert all(parameter._version == version for parameter, version in versions)
    assert torch.equal(host.table, torch.ones(2)) and host.training


def test_buffers_that_are_written_are_the_copys_own():
    host = Writer()
    running = ModelRunner(host)
    running.run(Call((torch.ones(1, 3),)))
    assert running.changed() == []
    running.run(Call((torch.ones(1, 3), "buffer")))
    assert running.changed() == ["seen"] and not host.seen.any()


class Drawing(nn.Module):
    """Draws from whatever its forward is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor, source: str) -> Tensor:
        draws = {
            "torch": lambda: torch.rand(()),
            "numpy": np.random.rand,
            "python": random.random,
            "own": lambda: torch.rand((), generator=self.own),
            "nothing": lambda: 1.0,
        }
        return x * draws[source]()


@pytest.mark.parametrize("source", ["torch", "numpy", "python", "own", "nothing"])
def test_random_models_are_seeded_and_generators_restored(source: str):
    host = Drawing()

    def states() -> list[object]:
        numbers = np.random.get_state()
        return [torch.get_rng_state().tolist(), host.own.get_state().tolist(), random.getstate(), repr(numbers)]

    before = states()
    runs = [ModelRunner(host).run(Call((torch.ones(()), source)), seed) for seed in (0, 0, 1)]
    assert states() == before
    assert torch.equal(runs[0].output, runs[1].output)
    seeded = source in {"torch", "numpy", "python"}
    assert torch.equal(runs[0].output, runs[2].output) != seeded
    assert [run.drew for run in runs] == [seeded] * 3


def test_the_random_state_is_kept_by_a_block_that_fails():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), preserve_random_state(nn.Module()):
        torch.rand(()) / 0
        1 / 0  # noqa: B018  (it is to fail)
    assert torch.equal(torch.get_rng_state(), before)
