"""What a training step costs in lorac's eager target and in PEFT: time and peak memory, SmolLM2-135M on the CPU.

    python -m benchmarks.train [--steps 5] [--length 128] [--batch 1] [--layers 30] [--processes 3] [--only NAME ...]

Both sides train the same adapter on the same tokens with AdamW. A step's time is measured with all sides in one
process, alternating; the peak is the high-water mark of two steps in a process that holds one side only, what is
resident before them (imports, the model) included, what loading took at its worst not.
Targets: time and peak <= 1.1 of PEFT's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import common

FEW, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = {
    f"{method} {label}{' checkpointed' if checkpointing else ''}": (method, targets, checkpointing)
    for method in ("lora", "dora")
    for label, targets in (("q,v", FEW), ("all", ALL))
    for checkpointing in (False, True)
}
LORAC, PEFT, AGAIN = SIDES = ("lorac", "peft", "peft again")
WHAT = {"step": ("ms", 1e3), "peak": ("MiB", 1.0)}


def stepper(side: str, case: str, model: Any, given: argparse.Namespace) -> Callable[[], Any]:
    """A function that trains one step on one side."""
    import torch

    method, targets, checkpointing = CASES[case]
    wrapped = _lorac(model, method, targets) if side == "lorac" else _peft(model, method, targets)
    if checkpointing:
        wrapped.activation_checkpointing_enable()
    wrapped.train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
    shape, generator = (given.batch, given.length), torch.Generator().manual_seed(0)
    tokens = torch.randint(10, model.config.vocab_size, shape, generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return step


def _lorac(model: Any, method: str, targets: tuple[str, ...]) -> Any:
    import lorac

    variant = lorac.DoRA if method == "dora" else lorac.LoRA
    return lorac.compile(model, {"a": variant(r=8, alpha=16, targets=targets)})


def _peft(model: Any, method: str, targets: tuple[str, ...]) -> Any:
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(targets), use_dora=method == "dora")
    return peft.get_peft_model(model, config)


def jobs(given: argparse.Namespace) -> Sequence[common.Job]:
    """Times of all sides together, peaks of each side alone."""
    return [(case, *rest) for case in given.only for rest in (("step",), *(("peak", side) for side in SIDES))]


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """Seconds per step of every side, or the high-water mark of two steps of one side in MiB."""
    case, what, *alone = job
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
    title = (
        f"Training {given.model} ({given.layers} layers), r = 8, {given.batch} x {given.length} tokens; target <= 1.1"
    )
    promised = [(case, what) for case in given.only for what in WHAT]
    return [common.Table(title, columns, rows, promised, a_a)]


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
    ),
    jobs=jobs,
    measure=measure,
    tables=tables,
)

if __name__ == "__main__":
    BENCHMARK.main()
