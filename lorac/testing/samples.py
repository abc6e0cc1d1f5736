"""Configurations to test a variant in, and adapters away from their init."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from lorac.errors import OptionError
from lorac.ir.sites import Site
from lorac.session.api import compile
from lorac.testing.parity import CONTRIBUTION, contribution
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant, dataclass_fields
from lorac.variants.params import Role

Tensor = torch.Tensor
AIM = 0.2
"""Share of the base's output that a sampled adapter contributes."""
_SCALES = {"alpha": 5.0, "scale": 0.7}
"""Values for fields that are factors by their name: away from 1 and from any rank, so that a lost factor shows."""
_FALLING = [2.0**-n for n in range(6)]
_COMMON = frozenset(dataclass_fields(Variant))  # type: ignore[type-abstract]  # its fields alone are read


def samples(variant: type[Variant] | Variant, **fields: Any) -> list[Variant]:
    """Configurations to test: ranks 3 and 1 (unequal where there are several), every switch turned once.

    Args:
        variant: a class; of an instance nothing is varied.
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
            next_step="give the fields to conformance(), or a configured instance",
        )
    ranks = [f.name for f in own if f.name == "r" or f.name.startswith("r_")]
    fixed = {**{f.name: _SCALES[f.name] for f in own if f.name in _SCALES}, **fields}
    high: dict[str, Any] = {name: (3, 1)[i % 2] for i, name in enumerate(ranks)}
    low: dict[str, Any] = {name: (1, 3)[i % 2] for i, name in enumerate(ranks)}
    switches: list[dict[str, Any]] = [{f.name: not f.default} for f in own if isinstance(f.default, bool)]
    first = variant(**{**high, **fixed})
    return [first, *(dataclasses.replace(first, **changed) for changed in (low, *switches) if changed)]


def describe_sample(variant: Variant) -> str:
    """A configuration in a few words: the method and what differs from its defaults."""
    changed = [
        f"{f.name}={getattr(variant, f.name):g}" if not isinstance(f.default, bool) else f.name
        for f in dataclasses.fields(variant)
        if f.name not in _COMMON and isinstance(f.default, int | float) and getattr(variant, f.name) != f.default
    ]
    return ",".join((variant.name, *changed))


def adapter_away(variant: Variant, model: nn.Module, inputs: Tensor, *, name: str, seed: int) -> Adapter:
    """An adapter whose every trained or frozen tensor is far from its init and unlike every other.

    Its strength is searched so that it contributes a fifth of the base's output.

    Args:
        variant: the method, targets included.
        model: the host, float64.
        inputs: what the contribution is measured on.
        name: the adapter's name.
        seed: every seed gives other tensors.
    """
    compiled = compile(model, {name: variant})
    adapter = compiled.adapters[name]
    generator = torch.Generator().manual_seed(seed)
    sites = {path: plan.site for path, plan in compiled.plans.items()}
    moves = [(t, _interpolator(t, generator)) for t in _movable_tensors(adapter, sites)]
    with torch.no_grad():
        base = model(inputs)

        def share(strength: float) -> float:
            for tensor, move in moves:
                tensor.copy_(move(strength))
            return next(iter(contribution(compiled(inputs), base).values()))

        _search_strength(share)
    # One copy per tensor, so that what the sites share stays shared.
    copies = {id(t): t.detach().clone() for t in adapter.parameters()}
    tensors = {path: {key: copies[id(t)] for key, t in at.items()} for path, at in adapter.tensors.items()}
    return Adapter(name, adapter.variant, tensors)


def _movable_tensors(adapter: Adapter, sites: Mapping[str, Site]) -> list[Tensor]:
    """The distinct tensors that a file could hold any value of: all but buffers and indices."""
    found: dict[int, Tensor] = {}
    for path, tensors in adapter.tensors.items():
        specs = adapter.variant.at(sites[path]).specs(sites[path])
        found |= {id(t): t for key, t in tensors.items() if specs[key].role in {Role.TRAINABLE, Role.FROZEN}}
    return list(found.values())


def typical_size(tensor: Tensor) -> float:
    """The size of a change that is far for ``tensor``: its deviation, or where it is constant, a typical init's."""
    deviation = float(tensor.double().std(correction=0)) if tensor.numel() > 1 else 0.0
    return deviation or 0.3 * float(tensor.double().abs().mean()) or max(tensor.shape[-1:] or (1,)) ** -0.5


def _interpolator(tensor: Tensor, generator: torch.Generator) -> Callable[[float], Tensor]:
    start = tensor.detach().clone()
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float64) * typical_size(start)
    return lambda strength: start + strength * noise


def _search_strength(share: Callable[[float], float]) -> None:
    """Leave the adapter at a strength whose contribution is near the aim.

    What begins farther from the base than that is left as far from its beginning as the window admits.
    """
    low, high = 0.0, 0.05
    if share(low) > AIM:
        assert any(CONTRIBUTION[0] <= share(strength) <= CONTRIBUTION[1] for strength in _FALLING), (
            f"it begins far from the base, and no strength contributes {CONTRIBUTION[1]:.0%} or less"
        )
        return
    while share(high) < AIM:
        low, high = high, 2 * high
        assert high < 1e4, "the adapter hardly moves the output, whatever its strength"
    for _ in range(60):
        middle = (low + high) / 2
        found = share(middle)
        if abs(found - AIM) <= 0.1 * AIM:
            return
        low, high = (middle, high) if found < AIM else (low, middle)
    # A method that jumps (a router) may have no such strength; what counts is the window.
    assert CONTRIBUTION[0] <= found <= CONTRIBUTION[1], f"found no strength that contributes {AIM:.0%}"
