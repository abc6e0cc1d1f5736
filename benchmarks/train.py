"""The cost of a training step in lorac's eager target and in PEFT: time and peak memory, SmolLM2-135M on the CPU.

    python -m benchmarks.train [--steps 5] [--length 128] [--batch 1] [--layers 30] [--processes 3] [--only NAME ...]
                               [--rules NAME ...]

Both sides train the same adapter on the same tokens with AdamW. A step's time is measured with all sides in one
process, alternating; the peak is the high-water mark of two steps in a process that holds one side only, what is
resident before them (imports, the model) included, what loading took at its worst not.
Targets: time <= 1.05 and peak <= 1.1 of PEFT's.

Every training rule stands beside plain LoRA with AdamW on all linear layers, LoRA+ beside PEFT's of the same name.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import common

FEW, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
METHODS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "lora": ("LoRA", {"r": 8, "alpha": 16}, "LoraConfig", {"r": 8, "lora_alpha": 16}),
    "dora": ("DoRA", {"r": 8, "alpha": 16}, "LoraConfig", {"r": 8, "lora_alpha": 16, "use_dora": True}),
    "shira": ("SHiRA", {"r": 8}, "ShiraConfig", {"r": 8}),
    "vera": ("VeRA", {"r": 256}, "VeraConfig", {"r": 256}),
    "loha": ("LoHa", {"r": 8}, "LoHaConfig", {"r": 8}),
    "lokr": ("LoKr", {"r": 8}, "LoKrConfig", {"r": 8}),
    "oft": ("OFT", {"block_size": 32}, "OFTConfig", {"oft_block_size": 32}),
    "ia3": ("IA3", {"feedforward": ("down_proj",)}, "IA3Config", {"feedforward_modules": ["down_proj"]}),
    "fourierft": ("FourierFT", {"n_frequency": 1000}, "FourierFTConfig", {"n_frequency": 1000}),
    "hra": ("HRA", {"r": 8}, "HRAConfig", {"r": 8}),
    "miss": ("MiSS", {"r": 64}, "MissConfig", {"r": 64}),
    "delora": ("DeLoRA", {"r": 8}, "DeloraConfig", {"r": 8}),
}
"""A method: lorac's class and PEFT's, with the same settings."""
CASES = {
    f"{method} {label}{' checkpointed' if checkpointing else ''}": (method, targets, checkpointing)
    for method in METHODS
    for label, targets in (("q,v", FEW), ("all", ALL))
    for checkpointing in (False, True)
    if method in ("lora", "dora") or (targets, checkpointing) == (ALL, False)
}
LORAC, PEFT, AGAIN = SIDES = ("lorac", "peft", "peft again")
RULES = (
    "LoRA+",
    "LoRA+ in PEFT",
    "preconditioned",
    "LoRA-Pro, efficient",
    "LoRA-Pro, full",
    "AltLoRA",
    "AltLoRA, idle skipped",
    "AltLoRA+",
    "ALLoRA",
    "ReLoRA",
    "DyLoRA",
    "SoRA",
    "GaLore, r = 128",
)
PLAIN, PLAIN_AGAIN, PLAIN_PEFT = PLAINS = ("LoRA", "LoRA again", "LoRA in PEFT")
WHAT = {"step": ("ms", 1e3), "peak": ("MiB", 1.0)}


def stepper(side: str, case: str, model: Any, given: argparse.Namespace) -> Callable[[], Any]:
    """Return a function that trains one step on one side."""
    import torch

    method, targets, checkpointing = CASES[case]
    wrapped = _lorac(model, method, targets) if side == "lorac" else _peft(model, method, targets)
    if checkpointing:
        wrapped.activation_checkpointing_enable()
    return _stepping(wrapped, torch.optim.AdamW(_trained(wrapped), lr=1e-4), model, given)


def _trained(wrapped: Any) -> list[Any]:
    return [p for p in wrapped.parameters() if p.requires_grad]


def _stepping(wrapped: Any, optimizer: Any, model: Any, given: argparse.Namespace) -> Callable[[], Any]:
    import torch

    wrapped.train()
    shape, generator = (given.batch, given.length), torch.Generator().manual_seed(0)
    tokens = torch.randint(10, model.config.vocab_size, shape, generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def _lorac(model: Any, method: str, targets: tuple[str, ...]) -> Any:
    import lorac

    name, settings, *_ = METHODS[method]
    return lorac.compile(model, {"a": getattr(lorac, name)(**settings, targets=targets)})


def _peft(model: Any, method: str, targets: tuple[str, ...]) -> Any:
    import peft

    *_, name, settings = METHODS[method]
    return peft.get_peft_model(model, getattr(peft, name)(**settings, target_modules=list(targets)))


def ruled(side: str, model: Any, given: argparse.Namespace) -> Callable[[], Any]:
    """Return a function that trains one step with a rule, or plainly."""
    import torch

    from lorac import training

    if side.endswith("in PEFT"):
        wrapped = _peft(model, "lora", ALL)
        return _stepping(wrapped, _peft_optimizer(wrapped, plus=side.startswith("LoRA+")), model, given)
    wrapped = _lorac_for(side, model, given)
    if side.startswith("GaLore"):
        groups = training.galore_groups(wrapped, rank=128, update_proj_gap=200)
        return _stepping(wrapped, training.GaLoreAdamW(groups, lr=1e-4), model, given)
    own_moments = side in {"LoRA-Pro, full", "AltLoRA", "AltLoRA, idle skipped", "AltLoRA+", "ALLoRA"}
    kind = torch.optim.SGD if own_moments else torch.optim.AdamW
    optimizer = kind(_trained(wrapped), lr=1e-4)
    if side not in PLAINS:
        _rules()[side](wrapped, optimizer)
    return _stepping(wrapped, optimizer, model, given)


def _rules() -> dict[str, Callable[[Any, Any], Any]]:
    from lorac import training

    skipping = training.AlternatingFactors(skip_idle=True)
    return {
        "LoRA+": training.LoRAPlus,
        "preconditioned": lambda c, o: training.Preconditioned(c, o, reg=1e-2),
        "LoRA-Pro, efficient": training.LoRAPro,
        "LoRA-Pro, full": lambda c, o: training.LoRAPro(c, o, full=True),
        "AltLoRA": training.AltLoRA,
        "AltLoRA, idle skipped": lambda c, o: training.AltLoRA(c, o, turns=skipping),
        "AltLoRA+": lambda c, o: training.AltLoRA(c, o, plus=True),
        "ALLoRA": training.ALLoRA,
        "ReLoRA": lambda c, o: training.ReLoRA(c, o, into="sum", every=1000),
        "DyLoRA": training.NestedRanks,
        "SoRA": training.ProximalGates,
    }


def _lorac_for(side: str, model: Any, given: argparse.Namespace) -> Any:
    """Return the model with what a rule trains, at rank 8."""
    import lorac

    settings: dict[str, Any] = {"r": 8, "alpha": 8 if side == "ALLoRA" else 16, "targets": ALL}
    method = {"DyLoRA": lorac.DyLoRA, "SoRA": lorac.SoRA}.get(side, lorac.LoRA)
    adapters = {"a": lorac.Full(targets=ALL) if side.startswith("GaLore") else method(**settings)}
    if side == "ReLoRA":
        adapters["sum"] = lorac.LoRA(r=16, alpha=16, targets=ALL)
    return lorac.compile(model, adapters, active=dict.fromkeys(adapters, 1.0))


def _peft_optimizer(wrapped: Any, *, plus: bool) -> Any:
    import torch
    from peft.optimizers import create_loraplus_optimizer

    if not plus:
        return torch.optim.AdamW(_trained(wrapped), lr=1e-4)
    return create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)


def jobs(given: argparse.Namespace) -> Sequence[common.Job]:
    """List the jobs: times of all sides together, peaks of each side alone."""
    found = [(case, *rest) for case in given.only for rest in (("step",), *(("peak", side) for side in SIDES))]
    return [*found, ("rules", "step"), *(("rules", "peak", side) for side in (*PLAINS, *given.rules))]


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """Seconds per step of every side, or the high-water mark of two steps of one side in MiB."""
    case, what, *alone = job
    if case == "rules":
        return _measure_rules(alone or [*PLAINS, *given.rules], what, given)
    if what == "step":
        model = common.host(given)
        steps = {side: stepper(side, case, copy.deepcopy(model), given) for side in SIDES}
        return common.alternate(steps, given.steps, warm_up=1)
    (side,) = alone
    step = stepper(side, case, common.host(given), given)
    common.forget_peak()
    for _ in range(2):
        step()
    return {side: common.peak()}


def _measure_rules(sides: Sequence[str], what: str, given: argparse.Namespace) -> dict[str, float]:
    """Measure as ``measure`` does; lorac's sides share the model, whose weights they only read."""
    model = common.host(given)
    steps = {side: ruled(side, copy.deepcopy(model) if side.endswith("PEFT") else model, given) for side in sides}
    if what == "step":
        return common.alternate(steps, given.steps, warm_up=1)
    (side,) = sides
    common.forget_peak()
    for _ in range(2):
        steps[side]()
    return {side: common.peak()}


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """One row for the time and one for the peak of every case."""
    rows, a_a = [], {}
    for case in given.only:
        peaks = {side: found[(case, "peak", side)][side] for side in SIDES}
        for what, values in (("step", found[(case, "step")]), ("peak", peaks)):
            unit, factor = WHAT[what]
            again, ratio = values[AGAIN] / values[PEFT], values[LORAC] / values[PEFT]
            sides = (f"{values[side] * factor:.0f} {unit}" for side in (LORAC, PEFT))
            rows.append((case, what, *sides, f"{again:.2f}", f"{ratio:.2f}"))
            a_a[f"{case}, {what}"] = again
    columns = ("adapter", "", "lorac", "peft", "A/A", "lorac / peft")
    sizes = f"{given.model} ({given.layers} layers), {given.batch} x {given.length} tokens"
    title = f"Training {sizes}; targets: step <= 1.05, peak <= 1.1"
    promised = [(case, what) for case in given.only for what in WHAT]
    return [common.Table(title, columns, rows, promised, a_a), _table_of_rules(found, given)]


def _table_of_rules(found: common.Found, given: argparse.Namespace) -> common.Table:
    """One row for the time and one for the peak of every rule."""
    rows, a_a = [], {}
    peaks = {side: found[("rules", "peak", side)][side] for side in (*PLAINS, *given.rules)}
    for what, values in (("step", found[("rules", "step")]), ("peak", peaks)):
        unit, factor = WHAT[what]
        a_a[what] = values[PLAIN_AGAIN] / values[PLAIN]
        for rule in given.rules:
            plain = values[PLAIN_PEFT if rule.endswith("in PEFT") else PLAIN]
            told = (f"{value * factor:.0f} {unit}" for value in (values[rule], plain))
            rows.append((rule, what, *told, f"{a_a[what]:.2f}", f"{values[rule] / plain:.2f}"))
    rows.sort(key=lambda row: given.rules.index(row[0]))
    columns = ("rule", "", "with it", "plain LoRA", "A/A", "with / plain")
    title = (
        f"Rules of a step: all linear layers of {given.model} ({given.layers} layers), r = 8, beside LoRA with AdamW"
    )
    promised = [(rule, what) for rule in given.rules for what in WHAT]
    return common.Table(title, columns, rows, promised, a_a)


BENCHMARK = common.Benchmark(
    name="train",
    text=__doc__,
    options=(
        common.TEXT_MODEL,
        common.layers(30),
        common.Option("steps", 5, smoke=1, help="timed in each process, all sides in each"),
        common.Option("length", 128, smoke=8, help="of a row, in tokens"),
        common.Option("batch", 1, smoke=1, help="rows of a step"),
        common.Option("only", tuple(CASES), smoke=("lora q,v", "dora all checkpointed"), help="these adapters"),
        common.Option("rules", RULES, smoke=("LoRA+", "LoRA+ in PEFT", "AltLoRA", "ALLoRA"), help="these rules"),
    ),
    jobs=jobs,
    measure=measure,
    tables=tables,
    rooms=common.TRAINING,
)

if __name__ == "__main__":
    BENCHMARK.main()
