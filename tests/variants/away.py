"""Adapters away from their init on whole models, contributing about a fifth of the output."""

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import lorac
from tests.parity import contribution


def away(source: Any, model: nn.Module, inputs: Any, name: str, share: float = 0.2) -> lorac.Adapter:
    """A fresh adapter of a variant with every tensor drawn anew, contributing ``share`` of the output."""
    return scaled(drawn(source, model, name), model, inputs, share)


@torch.no_grad()
def drawn(source: Any, model: nn.Module, name: str) -> lorac.Adapter:
    """A fresh adapter of a variant with every tensor drawn anew."""
    adapter = lorac.compile(model, {name: source}).adapters[name]
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for tensor in adapter.parameters():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.copy_(tensor.shape[-1] ** -0.5 * noise)
    return _detached(adapter)


@torch.no_grad()
def scaled(adapter: lorac.Adapter, model: nn.Module, inputs: Any, share: float = 0.2) -> lorac.Adapter:
    """The adapter with the tensors that end its branches (``up…`` or ``lora_B``) scaled to contribute ``share``."""
    compiled = lorac.compile(model, {adapter.name: adapter})
    found = compiled.adapters[adapter.name]
    ends = [t for at in found.tensors.values() for key, t in at.items() if key.startswith("up") or key == "lora_B"]
    starts = [tensor.clone() for tensor in ends]

    def call(module: Any) -> Any:
        return module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)

    base, low, high = call(model), 0.0, None
    strength = 1.0
    for _ in range(40):
        for tensor, start in zip(ends, starts, strict=True):
            tensor.copy_(strength * start)
        moved = max(contribution(call(compiled), base).values())
        if abs(moved - share) < 0.15 * share:
            return _detached(found)
        low, high = (strength, high) if moved < share else (low, strength)
        # Until it is bracketed by fourfold steps, then by halving.
        strength = 4 * low if high is None else (low + high) / 2 if low else high / 4
    raise AssertionError(f"no strength contributes {share:.0%}")


def _detached(adapter: lorac.Adapter) -> lorac.Adapter:
    copies = {id(tensor): tensor.detach().clone() for tensor in adapter.parameters()}
    tensors = {path: {key: copies[id(t)] for key, t in at.items()} for path, at in adapter.tensors.items()}
    return lorac.Adapter(adapter.name, adapter.variant, tensors)
