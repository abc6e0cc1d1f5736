"""Mistakes in how adapters begin, are trained on smaller models and go over to others: of ``test_mistakes.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lorac
from lorac.training import initialisation as starts
from lorac.training import loram, transfer
from tests.mistakes import Mistake, World, lora

QUERY = {"r": 2, "targets": ["q_proj"]}


def _loss(model: Any, batch: Any) -> torch.Tensor:
    return model(**batch).square().mean()  # type: ignore[no-any-return]


def _example() -> list[Any]:
    from tests.mistakes import example

    return [example()]


def _decoder() -> nn.Module:
    """An attention and a perceptron by their usual names, which are never run."""
    layer = nn.Module()
    for name, out, columns in (("gate_proj", 6, 4), ("up_proj", 6, 4), ("down_proj", 4, 6)):
        layer.add_module(name, nn.Linear(columns, out, bias=False))
    return nn.Sequential(layer)


def _small(w: World, hidden: float) -> Any:
    smaller = loram.prune(_decoder(), hidden=hidden)
    own = {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(3, 2)}
    adapter = lorac.Adapter("a", lorac.LoRA(r=2, targets=["up_proj"]), {"0.up_proj": own})
    return loram.recover(adapter, smaller.kept, _decoder())


BEGINNING = [
    Mistake(
        "a start from gradients without data",
        lambda w: starts.LoRAGA(loss=_loss)(lora(), w.model),
        lambda w, said: starts.LoRAGA(loss=_loss)(lora(), w.model, batches=_example()),
    ),
    Mistake(
        "batches that a model answers without a loss",
        lambda w: starts.LoRAGA()(lora(), w.model, _example()),
        lambda w, said: starts.LoRAGA(loss=_loss)(lora(), w.model, _example()),
    ),
    Mistake(
        "a start of another method",
        lambda w: starts.PiSSA()(lorac.LoRAXS(**QUERY), w.model),
        lambda w, said: (starts.PiSSA()(lorac.LoRA(**QUERY), w.model), starts.PiSSA()(lorac.DoRA(**QUERY), w.model)),
    ),
    Mistake(
        "more singular vectors than a weight has",
        lambda w: starts.LoRAGA(loss=_loss)(lora(r=13), w.model, _example()),
        lambda w, said: starts.LoRAGA(loss=_loss)(lora(r=12), w.model, _example()),
    ),
    Mistake("a direction that there is not", lambda w: starts.LoRAGA(direction="ArB")),
    Mistake(
        "components of too few positions",
        lambda w: starts.EVA()(lora(r=12), w.model, _example()),
        lambda w, said: starts.EVA()(lora(r=2), w.model, _example()),
    ),
    Mistake(
        "an adapter of another smaller model",
        lambda w: _small(w, 0.2),
        lambda w, said: _small(w, 0.5),
    ),
    Mistake(
        "nothing that could be pruned",
        lambda w: loram.prune(nn.Sequential(nn.Linear(3, 3))),
    ),
    Mistake(
        "a transfer without a tokenizer",
        lambda w: transfer.answer_prompts(w.eager, ["a"], adapters="sql"),
    ),
    Mistake(
        "prompts that nobody accepts",
        lambda w: transfer.synthesise_prompts(
            lambda n, seed: ["a"] * n, lambda prompts: [False] * len(prompts), 2, tries=8
        ),
        lambda w, said: transfer.synthesise_prompts(
            lambda n, seed: ["a"] * n, lambda prompts: [True] * len(prompts), 1, tries=9
        ),
    ),
]
