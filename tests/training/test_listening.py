"""A rule may read values that branches emit: every micro-batch once, however often a checkpoint recomputes it."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorac
from lorac.training.rule import Rule

X = torch.randn(4, 3, 6)


class Loads(Rule):
    """Counts to whom tokens are sent, over the micro-batches of a step."""

    methods = (lorac.MeteoRA,)
    governed = ("moe_gate",)
    listens: ClassVar[tuple[str, ...]] = ("router",)

    def __init__(self, compiled, optimizer):
        super().__init__(compiled, optimizer)
        self.tokens, self.steps = {}, []
        self.attach()

    def hear(self, emitted):
        for path, logits in emitted["router"].items():
            assert not logits.requires_grad
            self.tokens[path] = self.tokens.get(path, 0) + logits[..., 0].numel()

    def after(self):
        self.steps.append(self.tokens)
        self.tokens = {}


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.second(checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=False))


@pytest.mark.parametrize("asked", [(), ("router",)])
def test_every_micro_batch_is_heard_once(asked) -> None:
    compiled = lorac.compile(Checkpointed(), {"m": lorac.MeteoRA(r=2)}, aux=asked).train()
    optimizer = torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=0.1)
    with Loads(compiled, optimizer) as rule:
        for micro in (2, 1):
            for _ in range(micro):
                compiled(X).square().sum().backward()
            optimizer.step()
        compiled.eval()
        with torch.no_grad():
            compiled(X)  # trains nothing
    assert rule.steps == [{"first": 24, "second": 24}, {"first": 12, "second": 12}]
    assert rule.tokens == {}
    compiled.train()(X)
    assert rule.tokens == {}  # it was taken off
    assert compiled.aux.keys() == set(asked)


def test_rejects_outputs_that_no_adapter_emits() -> None:
    compiled = lorac.compile(nn.Sequential(nn.Linear(6, 6)), {"m": lorac.MeteoRA(r=2)})

    class Asking(Loads):
        listens = ("loads",)

    with pytest.raises(lorac.OptionError, match="no adapter gives the extra output 'loads'"):
        Asking(compiled, torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=0.1))
