"""Random operations on adapters on disk under a budget of memory, by threads at once, with failures and interrupts.

python -m campaigns.soak_bank [--operations N] [--seed N] [--processes N] [--json FILE]

One thread swaps, and is interrupted by signals and by failures injected into what it calls. Another removes adapters
that may be in use, registers others under their names, and changes the budget. Others call, with a choice for each row
too, hold choices over several calls, and read ahead. Every answer is held against the bits of a model that has the
adapters in memory. The budget has too little room for all of them, so that they are let go of and read again, and
requests are refused; no more than it admits may ever be counted. Between rounds nothing is in use: then nothing may be
left.
"""

from __future__ import annotations

import gc
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lorac
from campaigns import soak
from campaigns.soak import Flaky, Host, X, bits
from lorac.testing import adapter_away

ROOM = lorac.Reserve(targets=soak.WHERE, rank=4, adapters=2, scales=True)
LORA = lorac.LoRA(r=3, alpha=5, targets=soak.WHERE)
VARIANTS: dict[str, lorac.WeightVariant] = {
    "lora": LORA,
    "alike": LORA,  # adapters of one layout are read straight into their slots
    "too": LORA,
    "small": lorac.LoRA(r=1, targets=("down",)),
    "dora": lorac.DoRA(r=2, alpha=3, targets=("up", "head")),
    "ia3": lorac.IA3(targets=soak.WHERE),
    "vera": lorac.VeRA(r=3, targets=soak.WHERE),
}
CHANGING: dict[str, lorac.WeightVariant] = {"late": LORA, "other": lorac.DoRA(r=1, targets=("down", "head"))}
"""Adapters that are removed, and registered with other values."""
CHOICES: list[Any] = [None, *VARIANTS, {"lora": 0.7, "dora": 0.3}, {"vera": 1.0, "ia3": 0.5}, {"alike": -0.5}]
LEAST = 5
"""The smallest budget has room for one of so many adapters."""


class Bank(soak.Model):
    """A model with a budget, whose adapters lie on disk.

    Args:
        folder: an empty folder.

    Attributes:
        everything: the bytes that all choices take.
        versions: name -> the answers of the versions of an adapter that is exchanged.
    """

    def __init__(self, folder: Path) -> None:
        with torch.no_grad():
            super().__init__("onnxruntime", "live", _make_adapters(VARIANTS, 0), CHOICES, folder)
        self.versions: dict[str, list[bytes]] = {name: [] for name in CHANGING}
        for index in range(2):
            self._write_version(index)
        _save(self.adapters, folder / "adapters")
        self.compiled = soak.compile_host("onnxruntime", "live", {}, reserve=ROOM)
        for part in ("adapters", *(f"0/{name}" for name in CHANGING)):
            self.compiled.register(folder / part)
        for choice in CHOICES:
            self.compiled.swap(choice)
        self.everything = self.compiled.memory.used
        self.compiled.swap(None)
        states = self.compiled.switch.states
        self.flaky = [Flaky(self.compiled.engine, "bind_tensors"), Flaky(states._images, "read")]

    def fresh(self, choice: Any) -> lorac.Compiled:
        made = soak.compile_host("onnxruntime", "live", {}, reserve=ROOM)
        for adapter in self.adapters.values():
            made.add_adapter(adapter)
        made.swap(choice)
        return made

    def _write_version(self, index: int) -> None:
        """Write a version of the adapters that are exchanged, and keep its answers."""
        model, adapters = self.fresh(None), _make_adapters(CHANGING, 10 * (index + 1))
        for name, adapter in adapters.items():
            _save({name: adapter}, self.folder / str(index) / name)
            model.add_adapter(adapter)
            self.versions[name].append(bits(model(tokens=X, adapters=name)))

    def set_limit(self, chance: random.Random) -> None:
        """Give the budget another limit."""
        self.compiled.memory.limit = chance.randrange(self.everything // LEAST, self.everything)


def _make_adapters(variants: dict[str, lorac.WeightVariant], seed: int) -> dict[str, lorac.Adapter]:
    host = Host().double().eval()
    return {
        name: adapter_away(variant, host, X, name=name, seed=seed + index)
        for index, (name, variant) in enumerate(variants.items())
    }


def _save(adapters: dict[str, lorac.Adapter], folder: Path) -> None:
    """Write adapters, of the format of PEFT and of lorac's by turns."""
    folder.mkdir(parents=True)
    for index, (name, adapter) in enumerate(adapters.items()):
        path, format = (folder / name, "peft") if index % 2 else (folder / f"{name}.safetensors", "native")
        lorac.save_adapter(adapter, path, format=format, model=Host().double().eval())


class BankSoak(soak.Soak[Bank]):
    """One process' share."""

    def run(self, operations: int) -> dict[str, Any]:
        found = super().run(operations)
        for model in self.models:
            for name in tuple(model.compiled.pool):
                model.compiled.remove_adapter(name)
            gc.collect()
            self._held("all removed", model.compiled.memory.used == 0)
        return {**found, "count": dict(self.count)}

    def _typed(self, work: Callable[..., None], *given: Any) -> None:
        super()._typed(self._unless_refused, work, *given)

    def _unless_refused(self, work: Callable[..., None], *given: Any) -> None:
        try:
            work(*given)
        except lorac.OverBudget:
            self.count["refused for want of room"] += 1

    # --- the swapping thread's ---------------------------------------------------------------------------------

    def _call_or_swap(self, model: Bank, own: bool, choice: Any) -> None:
        self._unless_refused(super()._call_or_swap, model, own, choice)

    def _save(self, model: Bank) -> None:
        """Let go of everything, while nothing is in use."""
        model.compiled.swap(None)
        gc.collect()
        self._unless_refused(setattr, model.compiled.memory, "limit", 0)
        self._held("let go of all", model.compiled.memory.used == 0)
        model.set_limit(self.chance)

    # --- the others' -------------------------------------------------------------------------------------------

    def _call(self, model: Bank, chance: random.Random) -> None:
        works = [super()._call, self._call_changing, self._hold, self._prefetch]
        chance.choice(works)(model, chance)

    def _call_changing(self, model: Bank, chance: random.Random) -> None:
        name = chance.choice([*CHANGING])
        try:
            self._held("call while exchanged", bits(model.compiled(tokens=X, adapters=name)) in model.versions[name])
        except lorac.AdapterNotFound:
            self.count["call while removed"] += 1

    def _hold(self, model: Bank, chance: random.Random) -> None:
        """Hold a choice, whose adapter may be removed meanwhile."""
        name = chance.choice([*CHANGING, *VARIANTS])
        answers = model.versions.get(name) or [model.expected[name]]
        try:
            with model.compiled.hold(name) as held:
                found = {bits(model.compiled(tokens=X, adapters=held)) for _ in range(3)}
        except lorac.AdapterNotFound:
            self.count["held while removed"] += 1
            return
        self._held("held", len(found) == 1 and found <= {*answers})

    def _prefetch(self, model: Bank, chance: random.Random) -> None:
        model.compiled.prefetch(chance.choice(model.choices)).result(soak.PATIENCE)
        self._held("read ahead", True)

    def _add(self, model: Bank, chance: random.Random) -> None:
        """Exchange an adapter, or change the budget, which nobody else does meanwhile."""
        if chance.random() < 0.3:
            self._unless_refused(model.set_limit, chance)
        limit = model.compiled.memory.limit
        name, index = chance.choice([*CHANGING]), chance.randrange(2)
        model.compiled.remove_adapter(name)
        model.compiled.register(model.folder / str(index) / name)
        self._held("within the budget", limit is None or model.compiled.memory.used <= limit)
        self._held("exchange", bits(model.compiled(tokens=X, adapters=name)) == model.versions[name][index])


def share(given: tuple[int, int]) -> dict[str, Any]:
    """One process' share: (seed, operations) -> what came of it."""
    seed, operations = given
    soak.prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        return BankSoak(seed, [Bank(Path(folder))]).run(operations)


if __name__ == "__main__":
    soak.main(share, __doc__)
