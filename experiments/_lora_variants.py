"""Every way of training an adapter that fits the perceptron of ``_reader``: methods, rules and initialisers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from experiments._reader import TARGETS, host, learn, tasks, untrained
from experiments._study import adamw
from lorac import training
from lorac.training import initialisation
from lorac.variants import variants

RANKS = (1, 2, 4, 8, 16, 32, 64)
LORA = lorac.LoRA(r=8, alpha=16, targets=TARGETS)
LEFT_OUT = {
    "arrow": "mixes adapters that are trained already",
    "autolora": "mixes adapters that are trained already",
    "learned_cat": "mixes adapters that are trained already",
    "meteora": "mixes adapters that are trained already",
    "remix": "is trained by a loss of its own",
    "cp_lora": "is LoRA at linear layers",
    "lora_c": "is LoRA at linear layers",
    "edit": "is any change, here full fine-tuning",
    "ln_tuning": "trains norms, of which there are none",
    "magnitude": "is a part of DoRA",
}
SETTINGS: Mapping[str, Mapping[str, Any]] = {"lora": {"alpha": 16}, "vblora": {"vector_length": 32}}
"""Those that are not the defaults; the rank is chosen by the number of values."""


@dataclass(frozen=True)
class Way:
    """A way of training.

    Attributes:
        method: of the adapter.
        rule: (compiled, optimizer) -> the rule.
        optimizer: (parameters, rate) -> the optimizer.
        initialiser: rate -> what computes the first values.
    """

    method: Any
    rule: Callable[[Any, Any], Any] | None = None
    optimizer: Callable[[list[Tensor], float], Any] = adamw
    initialiser: Callable[[float], Any] | None = None

    def train(self, rate: float, seed: int, steps: int) -> float:
        """Return the loss on the whole code after some steps."""
        method = self.method if self.initialiser is None else self._initialise(self.initialiser(rate), seed)
        return learn(method, rate, seed, steps, optimizer=self.optimizer, rule=self.rule)[1][-1]

    def _initialise(self, initialiser: Any, seed: int) -> Any:
        torch.manual_seed(seed)
        batches: list[Any] = tasks()[1].batches(8, seed + 3000)
        calls = [x for x, _ in batches] if initialiser.reads == "activations" else batches
        return initialiser(self.method, host(seed % 10), calls)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss that initialisers read the gradient of."""
    return F.cross_entropy(model(batch[0]), batch[1])


def sgd(parameters: list[Tensor], rate: float) -> Any:
    """Return plain SGD."""
    return torch.optim.SGD(parameters, lr=rate)


RULES: Mapping[str, Way] = {
    "rsLoRA": Way(dataclasses.replace(LORA, rslora=True)),
    "LoRA+": Way(LORA, training.LoRAPlus),
    "LoRA-Pro": Way(LORA, training.LoRAPro),
    "Riemannian": Way(LORA, lambda c, o: training.Preconditioned(c, o, reg=1e-6)),
    "AltLoRA": Way(LORA, training.AltLoRA, sgd),
    "AltLoRA+": Way(LORA, lambda c, o: training.AltLoRA(c, o, plus=True), sgd),
    "ALLoRA": Way(dataclasses.replace(LORA, alpha=8), training.ALLoRA),
    "PiSSA": Way(LORA, initialiser=lambda _: initialisation.PiSSA()),
    "MiLoRA": Way(LORA, initialiser=lambda _: initialisation.MiLoRA()),
    "OLoRA": Way(LORA, initialiser=lambda _: initialisation.OLoRA()),
    "EVA": Way(LORA, initialiser=lambda _: initialisation.EVA()),
    "CorDA": Way(LORA, initialiser=lambda _: initialisation.CorDA()),
    "LoRA-GA": Way(LORA, initialiser=lambda _: initialisation.LoRAGA(loss=cross_entropy)),
    "LoRA-One": Way(LORA, initialiser=lambda _: initialisation.LoRAOne(loss=cross_entropy)),
    "LoRA-SB": Way(
        lorac.LoRAXS(r=53, alpha=53, targets=TARGETS),
        initialiser=lambda rate: initialisation.LoRASB(lr=rate, steps=100, loss=cross_entropy),
    ),
}
"""LoRA's own form, trained or begun in another way."""
OWN_RULES: Mapping[str, Callable[[Any, Any], Any]] = {
    "dylora": training.NestedRanks,
    "sora": lambda c, o: training.ProximalGates(c, o, threshold=1e-4),
    "flylora": training.Balanced,
}
"""Rules that belong to a method."""


@functools.cache
def ways() -> dict[str, Way]:
    """Return every way by name: methods at the rank that gives as many values as LoRA of rank 8, then LoRA's own."""
    built_in = {name: kind for name, kind in variants().items() if kind.__module__.startswith("lorac.variants.")}
    found = {name: _sized(kind) for name, kind in sorted(built_in.items()) if name not in LEFT_OUT}
    methods = {name: Way(method, OWN_RULES.get(name)) for name, method in found.items() if method is not None}
    return {"lora": methods.pop("lora"), **methods, **RULES}


def _sized(kind: Any) -> Any:
    """Return a method at the default or other rank that comes nearest to LoRA's number of values; None: none fits."""
    fields, settings = dataclasses.fields(kind), {"targets": TARGETS, **SETTINGS.get(kind.name, {})}
    if any(f.default is f.default_factory is dataclasses.MISSING for f in fields):
        return None
    ranked = RANKS if any(f.name == "r" for f in fields) and kind.name != "lora" else ()
    wanted, found = count_values(LORA), []
    for rank in ({}, *({"r": r} for r in ranked)):
        try:
            method = kind(**settings, **rank)
            found.append((abs(count_values(method) - wanted), method))
        except lorac.LoracError:  # not for these layers, or not of these sizes
            continue
    return min(found, key=lambda one: one[0], default=(0, None))[1]


def count_values(method: Any) -> int:
    """Return how many values a method trains on the perceptron, without compiling it."""
    found: dict[str, int] = {}
    for path in TARGETS:
        site = _sites()[path]
        method.check(site)
        for name, spec in method.params(site).items():
            if spec.role is lorac.Role.TRAINABLE:
                found[name if spec.shared else f"{path} {name}"] = math.prod(spec.shape)
    return sum(found.values())


@functools.cache
def _sites() -> Mapping[str, Any]:
    return lorac.sites(untrained())
