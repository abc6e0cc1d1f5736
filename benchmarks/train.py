"""What a training step costs in lorac's eager target and in PEFT: time and peak memory, SmolLM2-135M on the CPU.

    python -m benchmarks.train [--steps 5] [--length 128] [--batch 1] [--layers 30] [--processes 3] [--case NAME ...]

Both sides train the same adapter on the same tokens with AdamW. A step's time is measured with all sides in one
process, alternating; the peak is the high-water mark of two steps in a process that holds one side only, what is
resident before them (imports, the model) included, what loading took at its worst not.
Targets: time and peak <= 1.1 of PEFT's.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common

FEW, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = {
    f"{method} {label}{' checkpointed' if checkpointing else ''}": (method, targets, checkpointing)
    for method in ("lora", "dora")
    for label, targets in (("q,v", FEW), ("all", ALL))
    for checkpointing in (False, True)
}
SIDES = ("lorac", "peft", "peft again")


def stepper(side: str, case: str, model: Any, batch: int, length: int) -> Callable[[], Any]:
    """A function that trains one step on one side."""
    import torch

    method, targets, checkpointing = CASES[case]
    wrapped = _lorac(model, method, targets) if side == "lorac" else _peft(model, method, targets)
    if checkpointing:
        wrapped.activation_checkpointing_enable()
    wrapped.train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
    tokens = torch.randint(10, 40000, (batch, length), generator=torch.Generator().manual_seed(0))

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


def host(layers: int) -> Any:
    """SmolLM2, cut to its first layers."""
    from examples.models import smollm2

    model, _ = smollm2()
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = len(model.model.layers)
    return model


def time_worker(options: argparse.Namespace) -> dict[str, float]:
    """Seconds per step of every side."""
    model = host(options.layers)
    sides = {
        side: stepper(side, options.case[0], copy.deepcopy(model), options.batch, options.length) for side in SIDES
    }
    return common.alternate(sides, options.steps, warm_up=1)


def memory_worker(options: argparse.Namespace) -> dict[str, float]:
    """High-water mark of this process's steps in MiB, with one side in it."""
    step = stepper(options.side, options.case[0], host(options.layers), options.batch, options.length)
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
    for _ in range(2):
        step()
    marks = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"peak": int(marks["VmHWM"].split()[0]) / 1024}


def measured(options: argparse.Namespace, case: str) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and MiB of every side: medians over fresh processes."""
    settings = [f"--{name}={getattr(options, name)}" for name in ("steps", "length", "batch", "layers")]
    given = ("benchmarks.train", f"--case={case}", *settings)
    times = [common.in_fresh_process(*given, "--worker=time") for _ in range(options.processes)]
    peaks = [
        {side: common.in_fresh_process(*given, "--worker=memory", f"--side={side}")["peak"] for side in SIDES}
        for _ in range(options.processes)
    ]
    return common.medians(times), common.medians(peaks)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 5), ("length", 128), ("batch", 1), ("layers", 30), ("processes", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--worker", choices=("time", "memory"), help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(time_worker(options) if options.worker == "time" else memory_worker(options)))
        return
    rows = []
    for case in options.case:
        seconds, peaks = measured(options, case)
        for what, unit, found in (("step", "ms", {k: v * 1e3 for k, v in seconds.items()}), ("peak", "MiB", peaks)):
            ratios = (found["peft again"] / found["peft"], found["lorac"] / found["peft"])
            sides = (f"{found[side]:.0f} {unit}" for side in ("lorac", "peft"))
            rows.append((case, what, *sides, *(f"{ratio:.2f}" for ratio in ratios)))
            print("  ".join(rows[-1]), flush=True)
    title = (
        f"Training SmolLM2 ({options.layers} layers), r = 8, {options.batch} x {options.length} tokens; target <= 1.1"
    )
    common.print_table(title, ("adapter", "", "lorac", "peft", "A/A", "lorac / peft"), rows)


if __name__ == "__main__":
    main()
