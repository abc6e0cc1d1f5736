"""A small host and adapters of several methods and ranks to switch between, and answers compared bit by bit."""

from __future__ import annotations

import functools
from typing import Any

import torch

import lorac
from lorac.testing import adapter_away
from tests.zoo import ZOO

ENTRY = ZOO["plain_mlp"]
X = ENTRY.inputs(seed=1, batch=3)["tokens"]
MIXTURE = {"a": 0.7, "b": 0.3}
CYCLE: tuple[Any, ...] = ("a", "b", MIXTURE, "a", None)
CHOICES: tuple[Any, ...] = ("a", "b", MIXTURE, None)

_METHODS = {
    "lora": lorac.LoRA(r=3, alpha=5, targets=("up", "down", "head")),
    "dora": lorac.DoRA(r=3, alpha=5, targets=("up", "head")),
    "shira": lorac.SHiRA(r=1, targets=("up", "down")),
    "hydra": lorac.Hydra(r=2, r_sequential=1, targets=("down", "head")),
    "lora_small": lorac.LoRA(r=3, alpha=5, targets=("up", "head")),
    "lora_large": lorac.LoRA(r=4, alpha=5, targets=("embed", "up", "down")),
    "dora_large": lorac.DoRA(r=4, alpha=5, targets=("up", "down")),
}


@functools.cache
def adapter(method: str, name: str) -> lorac.Adapter:
    """An adapter of a method, away from its init."""
    return adapter_away(_METHODS[method], ENTRY.fresh(torch.float64), X, name=name, seed=len(method) + ord(name[0]))


def pair(first: str, second: str) -> list[lorac.Adapter]:
    """Two adapters, called a and b."""
    return [adapter(first, "a"), adapter(second, "b")]


def build(
    adapters: Any, target: str, mode: str = "live", *, dtype: torch.dtype = torch.float32, **rest: Any
) -> lorac.Compiled:
    """The host compiled with adapters."""
    model = ENTRY.model() if dtype == torch.float32 else ENTRY.fresh(dtype)
    options = {"threads": 1, "example_inputs": {"tokens": X}} if target == "onnxruntime" else {}
    return lorac.compile(model, adapters, target=target, mode=mode, **options, **rest)


def fresh(adapters: Any, target: str, mode: str, choice: Any, **rest: Any) -> lorac.Compiled:
    """A compile with a choice active from the start; what was emitted is checked elsewhere."""
    untested = {"self_test": False} if target == "onnxruntime" else {}
    return build(adapters, target, mode, active=choice, **untested, **rest)


def answer(compiled: lorac.Compiled, x: torch.Tensor = X, **choice: Any) -> torch.Tensor:
    """Return the output of a compiled model."""
    with torch.no_grad():
        return compiled(tokens=x, **choice)


def raw(value: torch.Tensor) -> bytes:
    """A tensor's bytes: unlike ``torch.equal`` they tell −0 from 0."""
    return value.detach().contiguous().view(torch.uint8).numpy().tobytes()


def key(choice: Any) -> str:
    """A choice as a dictionary's key."""
    return str(choice)
