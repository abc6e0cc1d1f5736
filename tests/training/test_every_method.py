"""Every listed method learns: the loss falls, trainable tensors change, and nothing else does."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lorac
from lorac import AdapterError, Role, Site, SiteError, SiteKind
from lorac.ir.sites.patterns import find_layer_index, is_named
from lorac.testing import samples
from lorac.variants._mixtures import LoraMixture
from lorac.variants.base import Variant
from tests import zoo
from tests.training.loops import TARGETS, data, host, plain_loop, trained

UNTRAINED = {"decor", "decor_weight", "prefix_tuning"}
"""Methods that are computed from a prompt, and one that lorac reads and refuses to train."""
BUILT_IN = {
    name: method
    for name, method in lorac.variants().items()
    if method.__module__.startswith("lorac.variants.") and name not in UNTRAINED
}
HOSTS = (("tiny_llama", "tiny_bert"), ("plain_conv",))
"""Of each group a method trains on the first host that has a place for it. BERT has layers that 3 divides."""
GIVEN: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"targets": ["o_proj"], "num_attention_heads": 4},
    "arrow": {"train_experts": True},
    "chain": {"parts": (lorac.LoRA(), lorac.DoRA())},
    "remix": {"experts": 3, "top_k": 3},
    "frod": {"exclude": ["grouped"]},
    "multitask_prompt_tuning": {"targets": ["embed_tokens"]},
    "prompt_tuning": {"targets": ["embed_tokens"]},
    "qst": {"blocks": ("model.layers.0", "model.layers.1"), "heads": 2, "intermediate": 128, "r": 4},
    "residual": {"method": lorac.LoRA()},
    "flexmore": {"ranks": (2, 0)},
    "split": {"parts": {"first": lorac.LoRA()}, "among": ("first", "second")},
    "supertuning": {"sparsity": 0.5},
    "trainable_tokens": {"token_indices": (1, 3)},
    "union": {
        "parts": (lorac.LoRA(r=4, targets=["q_proj"]), lorac.DoRA(r=4, targets=["v_proj"])),
        "targets": "all-linear",
    },
    "x_lora": {"hidden": "model.norm", "hidden_size": 64, "experts": 3},
}
"""Fields that have no default, or whose default fits no host; of Arrow, of which else nothing is trained; of ReMix,
whose router learns from its draws alone, all experts at once; and of SuperTuning, which trains few values else."""
STEPS, LR, FALL = 15, 3e-2, 0.95


def configurations(method: type[Variant]) -> Iterator[Variant]:
    """The method at its defaults; then, smaller, as the conformance kit tests it."""
    given = GIVEN.get(method.name, {})
    yield method(**given)
    oracle = importlib.import_module(f"tests.oracles.{method.name}")
    yield samples(method, **{**getattr(oracle, "FIELDS", {}), **given})[0]


def offers(method: type[Variant]) -> dict[str, Variant]:
    """Hosts with a place for the method, and the method there, of the first configuration that fits any of them."""
    for variant in configurations(method):
        found = {}
        for group in HOSTS:
            for name in group:
                placed = place(variant, name)
                if placed is not None:
                    found[name] = placed
                    break
        if found:
            return found
    raise AssertionError(f"no host has a place for {method.name}: give its oracle smaller FIELDS")


def place(variant: Variant, name: str) -> Variant | None:
    """The method on the sites of a host's first layer that it is defined on; None where there are none."""
    model = host(name)
    sites = {path: site for path, site in lorac.sites(model).items() if admits(variant, site)}
    if variant.targets != Variant.targets:  # it says itself where it belongs: behind modules, where it takes any
        sites = {p: s for p, s in sites.items() if SiteKind.BLOCK not in variant.kinds or s.kind is SiteKind.BLOCK}
        return variant if sites or any(variant.replaces_module(path) for path, _ in model.named_modules()) else None
    chosen = [path for path in sites if is_named(TARGETS[name], path) and not find_layer_index(path, ())]
    return dataclasses.replace(variant, targets=tuple(chosen)) if chosen else None


def admits(variant: Variant, site: Site) -> bool:
    """Whether a site is of a kind and a shape that the method takes."""
    try:
        variant.at(site).check(site)
        variant.at(site).params(site)
    except (SiteError, AdapterError):
        return False
    return variant.adapts(site)


def compiled_on(model: nn.Module, variant: Variant) -> tuple[Any, list[torch.Tensor]]:
    """A compiled model with the method at its start, and the tensors that are to train."""
    compiled = lorac.compile(model, {"a": variant})
    adapter = compiled.adapters["a"]
    generator = torch.Generator().manual_seed(0)
    learning = list(adapter.replaced.values())
    for path, tensors in adapter.tensors.items():
        site = compiled.sites[path]
        for key, spec in variant.at(site).params(site).items():
            if spec.role is Role.TRAINABLE:
                learning.append(tensors[key])
            elif isinstance(variant, LoraMixture) and not tensors[key].any():
                # Its LoRAs are trained elsewhere: in a fresh mixture they are zero, and the gates get no gradient.
                tensors[key].normal_(0, 0.5, generator=generator)
    return compiled, learning


def values(compiled: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a compiled model, host and adapters, by name."""
    return {**dict(compiled.named_parameters()), **dict(compiled.named_buffers())}


def assert_learns(variant: Variant, name: str) -> None:
    """A plain loop on one batch lowers the loss, moves what is to train and leaves every other bit as it was."""
    model = host(name)
    mark = zoo.fingerprint(model)
    compiled, learning = compiled_on(model, variant)
    optimised = trained(compiled)
    assert {id(t) for t in optimised} == {id(t) for t in learning}, f"{name}: not what the method says is trained"
    before = {key: tensor.detach().clone() for key, tensor in values(compiled).items()}
    batches = data(name, STEPS, distinct=False)
    # In eval mode, for BERT's own dropout moves the loss as much as a few steps do.
    first = compiled(**batches[0]).loss.item()
    plain_loop(compiled, batches, lr=LR, decay=0.1)
    last = compiled(**batches[0]).loss.item()
    assert last <= FALL * first, f"{name}: the loss went from {first:.4f} to {last:.4f}"
    for key, tensor in values(compiled).items():
        same = torch.equal(tensor, before[key])
        assert same != tensor.requires_grad, f"{name}: {key} {'did not train' if same else 'is frozen and changed'}"
    # Weight decay alone would change a tensor, too.
    assert all(bool(tensor.grad.any()) for tensor in optimised), f"{name}: a tensor has no gradient"
    assert zoo.fingerprint(model) == mark, f"{name}: training changed the host"


@pytest.mark.medium("low rank, a router and a sparse change", keep=["lora", "shira", "meteora"])
@pytest.mark.slow(
    "a method of each normal form; the kit differentiates every method",
    keep=["lora", "dora", "ia3", "shira", "hydra", "meteora", "bottleneck", "full", "trainable_tokens", "loha"],
)
@pytest.mark.parametrize("method", BUILT_IN.values(), ids=BUILT_IN)
def test_every_method_learns(method: type[Variant]) -> None:
    for name, variant in offers(method).items():
        assert_learns(variant, name)
