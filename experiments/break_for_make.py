"""Do a content and a style that were learned apart work together, without having met?

    python -m experiments.break_for_make [--seeds 5] [--steps 1200] [--smoke]

A layer is off by [A, E]·[C, D], the method's own form: A and C are the frozen halves, orthonormal rows as at the
authors' q, k and v, a style sets E, and a content sets D. Pairs of contents and styles give layers; that of content 0
and style 1 is never learned. A content's half is trained with styles as partners and the other way round, as in the
paper; then both halves are joined, and tuned in the second stage. Against them stands the sum of two LoRAs of the same
rank, one of the content's layer and one of the style's. What is measured is the error of the layer of the unseen pair,
as a share of the untouched layer's. Joined and not tuned, which the paper does not do, the halves' scales do not fit,
and the error is several times the sum's; half of the sum is about as good as what is tuned. With A = 0, tried first,
what is tuned is worse than the sum: the block A·D, where a content acts without a style, is gone then.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch import Tensor, nn

import lorac
from experiments._denoising import tables
from experiments._finding import Expected, Finding
from experiments._study import Experiment, Fault, deciding, main
from lorac.diffusion.break_for_make import HalfSettings, learn_both, learn_half, share_bases

SIZE, RANK = 32, 16


class Teacher:
    """The layers of all pairs of contents and styles, of one seed: the base, and changes of the method's own form."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        self.base = nn.Linear(SIZE, SIZE, bias=False)
        self.base.weight.data = torch.randn(SIZE, SIZE, generator=generator) * SIZE**-0.5
        method = lorac.PLP(r=RANK)
        halves = {"content": method, "style": method}
        self.compiled: Any = lorac.compile(nn.Sequential(self.base), halves, active="content")
        share_bases(self.compiled.adapters["content"], self.compiled.adapters["style"])
        own = self.compiled.adapters["content"].tensors["0"]
        self.up, self.down = own["up_frozen"].clone(), own["down_frozen"].clone()
        size = 2 * float(self.down.square().mean().sqrt())
        self.styles = [size * torch.randn(SIZE // 2, RANK, generator=generator) for _ in range(4)]
        self.contents = [size * torch.randn(RANK, SIZE // 2, generator=generator) for _ in range(4)]

    def weight(self, content: int, style: int) -> Tensor:
        """Return the layer of a pair."""
        up, down = torch.cat([self.up, self.styles[style]]), torch.cat([self.down, self.contents[content]], 1)
        return self.base.weight.data + up @ down


def loss(model: Any, teacher: Teacher, content: int, style: int, generator: torch.Generator) -> Tensor:
    """Return the error on random inputs, as a share of the untouched layer's."""
    x = torch.randn(64, SIZE, generator=generator)
    wanted = x @ teacher.weight(content, style).mT
    return (model(x) - wanted).square().mean() / (x @ teacher.base.weight.data.mT - wanted).square().mean()


def study(seed: int, steps: int) -> dict[str, float]:
    """Return the errors of the unseen pair (content 0, style 1) after each way."""
    teacher = Teacher(seed)
    model, compiled = nn.Sequential(teacher.base), teacher.compiled
    given = HalfSettings(steps=steps, rate=2e-3, partner_rate=2e-4, seed=seed)

    def of(content: int, style: int, within: Any = compiled) -> Any:
        return functools.partial(loss, within, teacher, content, style)

    def held(found: Any, choice: Any) -> float:
        found.swap(choice)
        with torch.no_grad():
            return float(loss(found, teacher, 0, 1, torch.Generator().manual_seed(1)))

    learn_half(compiled, "content", of(0, 0), [of(0, style) for style in (2, 3, 0)], given)
    learn_half(compiled, "style", of(1, 1), [of(content, 1) for content in (2, 3, 1)], given)
    joined = lorac.PLP.join(compiled.adapters["content"], compiled.adapters["style"], name="both")
    together: Any = lorac.compile(model, {"both": joined})
    figures = {"joined, as they are": held(together, "both")}
    tuned = HalfSettings(steps=max(steps // 10, 1), rate=2e-3, seed=seed)
    learn_both(together, "both", of(0, 0, together), of(1, 1, together), tuned, reg=1e-3)
    figures["joined and tuned"] = held(together, "both")
    plain: Any = lorac.compile(model, {"content": lorac.LoRA(r=RANK), "style": lorac.LoRA(r=RANK)})
    for name, pair in (("content", (0, 0)), ("style", (1, 1))):
        plain.swap(name)
        own = [t for tensors in plain.adapters[name].tensors.values() for t in tensors.values()]
        optimizer = torch.optim.AdamW(own, lr=1e-2)
        for step in range(steps):
            optimizer.zero_grad()
            loss(plain, teacher, *pair, torch.Generator().manual_seed(step)).backward()
            optimizer.step()
    figures["sum of two LoRAs"] = held(plain, {"content": 1.0, "style": 1.0})
    figures["half of the sum"] = held(plain, {"content": 0.5, "style": 0.5})
    figures["the content's LoRA alone"] = held(plain, "content")
    return figures


def find(given: argparse.Namespace) -> Finding:
    """Return the error of the unseen pair after each way."""
    found = [study(seed, given.steps) for seed in deciding(given)]
    errors = {side: {"error": [one[side] for one in found]} for side in found[0]}
    return Finding(tables("of the unseen pair, as a share of the untouched layer's", errors), EXPECTED)


EXPECTED = [Expected("error", "joined and tuned", "sum of two LoRAs", "section 4")]
EXPERIMENT = Experiment(
    claim="A content and a style that were learned in halves of their own work together better than a sum of LoRAs.",
    source="Xu et al., Break-for-Make, arXiv 2403.19456, section 4",
    find=find,
    steps=1200,
    first=100,
    fails_by="halves that fit one another no better than two LoRAs that never met",
    fault=Fault("there is no second stage", lambda: patch.dict(globals(), learn_both=Mock())),
)

if __name__ == "__main__":
    main(EXPERIMENT, "break_for_make", __doc__)
