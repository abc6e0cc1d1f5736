"""Configurations of a variant to test, and adapters away from their start values."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lorac.argument_types import Fields
from lorac.errors import OptionError
from lorac.session.api import compile
from lorac.testing.parity import CONTRIBUTION, contribution
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant, dataclass_fields
from lorac.variants.params import Role

AIM = 0.2
"""The contribution of a sampled adapter relative to the base's output."""
_SCALES = {"alpha": 5.0, "scale": 0.7}
"""Values for scale fields that differ from 1 and from all ranks, so that a missing factor shows."""
_FALLING = [2.0**-n for n in range(6)]
_COMMON = frozenset(dataclass_fields(Variant))  # type: ignore[type-abstract]  # its fields alone are read


def samples(variant: type[Variant] | Variant, **fields: Any) -> list[Variant]:
    """Return configurations to test: ranks 3 and 1 (unequal if there are several), and every switch flipped once.

    Args:
        variant: a class, or an instance that is the only configuration.
        **fields: hyper-parameters to set in all of them.

    Raises:
        OptionError: the class has a field without a default that ``fields`` does not set.
    """
    if isinstance(variant, Variant):
        return [dataclasses.replace(variant, **fields)]
    own = [f for f in dataclasses.fields(variant) if f.name not in _COMMON and f.name not in fields]
    missing = [f.name for f in own if f.default is f.default_factory is dataclasses.MISSING]
    if missing:
        raise OptionError(
            f"{variant.name} has no default for {', '.join(missing)}",
            next_step="give these fields to conformance(), or a configured instance",
        )
    ranks = [f.name for f in own if f.name == "r" or f.name.startswith("r_")]
    fixed = {**{f.name: _SCALES[f.name] for f in own if f.name in _SCALES}, **fields}
    high: Fields = {name: (3, 1)[i % 2] for i, name in enumerate(ranks)}
    low: Fields = {name: (1, 3)[i % 2] for i, name in enumerate(ranks)}
    switches: list[Fields] = [{f.name: not f.default} for f in own if isinstance(f.default, bool)]
    first = variant(**{**high, **fixed})
    return [first, *(dataclasses.replace(first, **changed) for changed in (low, *switches) if changed)]


def describe_sample(variant: Variant) -> str:
    """Describe a configuration by the method and the fields that differ from their defaults."""
    changed = [
        f"{f.name}={getattr(variant, f.name):g}" if not isinstance(f.default, bool) else f.name
        for f in dataclasses.fields(variant)
        if f.name not in _COMMON and isinstance(f.default, int | float) and getattr(variant, f.name) != f.default
    ]
    return ",".join((variant.name, *changed))


def adapter_away(variant: Variant, model: nn.Module, inputs: Tensor, *, name: str, seed: int) -> Adapter:
    """Return an adapter whose trained and frozen tensors are far from their start values and from each other.

    It contributes a fifth of the base's output.

    Args:
        variant: the method, with its targets.
        model: the host, float64.
        inputs: the inputs on which the contribution is measured.
        seed: the seed of its tensors.
    """
    compiled = compile(model, {name: variant})
    adapter = compiled.adapters[name]
    generator = torch.Generator().manual_seed(seed)
    sites = {path: plan.site for path, plan in compiled.plans.items()}
    found: dict[Role, dict[int, Tensor]] = {role: {} for role in Role}
    for path, at_site in adapter.tensors.items():
        specs = adapter.variant.at(sites[path]).specs(sites[path])
        for key, tensor in at_site.items():
            found[specs[key].role][id(tensor)] = tensor
    # The distinct tensors that may have any values: no indices, and buffers only of a method that has nothing else.
    movable = found[Role.TRAINABLE] | found[Role.FROZEN] or found[Role.BUFFER]
    moves = []
    for tensor in movable.values():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * typical_size(tensor.detach())
        moves.append((tensor, tensor.detach().clone(), noise))
    with torch.no_grad():
        base = model(inputs)

        def share(strength: float) -> float:
            for tensor, start, noise in moves:
                tensor.copy_(start + strength * noise)
            return next(iter(contribution(compiled(inputs), base).values()))

        _search_strength(share)
    # One copy per tensor, so that shared tensors stay shared.
    copies = {id(t): t.detach().clone() for t in adapter.parameters()}
    tensors = {path: {key: copies[id(t)] for key, t in at.items()} for path, at in adapter.tensors.items()}
    return Adapter(name, adapter.variant, tensors)


def typical_size(tensor: Tensor) -> float:
    """Return the size of a large change of a tensor: its deviation, or for a constant one that of a usual init."""
    deviation = float(tensor.double().std(correction=0)) if tensor.numel() > 1 else 0.0
    mean = float(tensor.double().abs().mean())
    deviates = deviation > 1e-6 * mean  # a tensor of ones that was computed is constant too
    return deviation if deviates else 0.3 * mean or max(tensor.shape[-1:] or (1,)) ** -0.5


def _search_strength(share: Callable[[float], float]) -> None:
    """Set the adapter to a strength with a contribution near the aim.

    An adapter that starts farther from the base keeps the largest strength within the limits.
    """
    low, high = 0.0, 0.05
    if share(low) > AIM:
        assert any(CONTRIBUTION[0] <= share(strength) <= CONTRIBUTION[1] for strength in _FALLING), (
            f"it starts far from the base, and no strength contributes {CONTRIBUTION[1]:.0%} or less"
        )
        return
    while share(high) < AIM:
        low, high = high, 2 * high
        assert high < 1e4, "the adapter hardly changes the output at any strength"
    for _ in range(60):
        middle = (low + high) / 2
        found = share(middle)
        if abs(found - AIM) <= 0.1 * AIM:
            return
        low, high = (middle, high) if found < AIM else (low, middle)
    # A method that jumps (a router) may have no such strength; the limits decide.
    assert CONTRIBUTION[0] <= found <= CONTRIBUTION[1], f"found no strength that contributes {AIM:.0%}"
