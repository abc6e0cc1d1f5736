"""Models and adapters of the tests on a GPU: two adapters of one model, on different layers, of different ranks."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

import lorac
from lorac.testing import contribution
from tests.zoo import ZOO, Inputs

Tensor = torch.Tensor
ONE, OTHER = "one", "other"
Choice = str | Mapping[str, float] | None
CHOICES: tuple[Choice, ...] = (None, ONE, OTHER, {ONE: 0.7, OTHER: 0.3})
"""What swaps choose between: the base, each, both."""
SHARE = 0.2
"""How much of its output's size an adapter moves a model by."""


def inputs(host: str, seed: int = 0, device: str = "cpu") -> Inputs:
    """Return the inputs of a call, of the example's sizes."""
    return {name: tensor.to(device) for name, tensor in ZOO[host].inputs(seed).items()}


@functools.cache
def adapters(host: str) -> Mapping[str, lorac.Adapter]:
    """Return two adapters away from their init: of rank 3 on half of the targets, and of rank 1 on the others."""
    entry = ZOO[host]
    parts = {ONE: entry.targets[::2], OTHER: entry.targets[1::2]}
    variants = {
        ONE: lorac.LoRA(r=3, alpha=6, targets=parts[ONE]),
        OTHER: lorac.LoRA(r=1, alpha=2, targets=parts[OTHER]),
    }
    return {name: _moved(host, name, variant) for name, variant in variants.items()}


@torch.no_grad()
def _moved(host: str, name: str, variant: lorac.LoRA) -> lorac.Adapter:
    """Return an adapter of noise, strong enough to change decisions."""
    model, entry = ZOO[host].model(), ZOO[host]
    compiled = lorac.compile(model, {name: variant})
    generator = torch.Generator().manual_seed(len(name))
    for tensor in compiled.adapters[name].parameters():
        tensor.normal_(0, 0.1, generator=generator)
    base = model(**inputs(host))
    (moved, *_) = contribution(compiled(**inputs(host)), base, entry.outputs).values()
    strength = (SHARE / moved) ** 0.5
    for tensor in compiled.adapters[name].parameters():
        tensor.mul_(strength)
    made: lorac.Adapter = compiled.adapters[name]
    return made


def compiled(host: str, mode: str, active: Choice = None, **options: Any) -> lorac.Compiled:
    """Compile the model with both adapters for TensorRT."""
    return lorac.compile(
        ZOO[host].model(),
        adapters(host),
        target="tensorrt",
        device="cuda",
        example_inputs=inputs(host),
        mode=mode,
        active=active,
        **options,
    )


def first(host: str, answer: object) -> Tensor:
    """Return the output that adapters change."""
    found = answer[ZOO[host].outputs[0]]  # type: ignore[index]
    assert isinstance(found, Tensor)
    return found
