"""Memory and time of training a side network, compared with a LoRA, in lorac's eager target: SmolLM2-135M on the CPU.

    python -m benchmarks.side [--steps 3] [--length 128] [--r 16] [--layers 30] [--processes 3]

QST by its two kinds of downsamplers, and a LoRA of r = 16 on all linear layers, train on the same tokens with AdamW.
"Kept" is what a step keeps for its backward pass, by torch's own hooks, weights left out. "Start" is the distance of
the first loss from the base's. Target: QST keeps <= 0.6 of what LoRA does, and starts at the base's loss.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.starts import stepper

LORA, AGAIN, *_ = SIDES = ("lora", "lora again", "qst adapter", "qst avg")


def begun(side: str, model: Any, r: int) -> Any:
    """Return a model with a fresh adapter."""
    import lorac

    if side in (LORA, AGAIN):
        return lorac.compile(model, {"a": lorac.LoRA(r=16, alpha=16)})
    return lorac.compile(model, {"a": lorac.QST.of(model, r=r, downsample=side.removeprefix("qst "))})


def kept(wrapped: Any, batch: Any) -> int:
    """Bytes that a training step keeps for its backward pass, weights left out."""
    import torch

    weights = {t.untyped_storage().data_ptr() for t in wrapped.state_dict(keep_vars=True).values()}
    weights |= {t.untyped_storage().data_ptr() for t in wrapped.parameters()}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            held.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = wrapped.train()(**batch).loss
    found = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    loss.backward()
    wrapped.zero_grad()
    return found


def jobs(given: argparse.Namespace) -> Sequence[common.Job]:
    """One, of all sides."""
    return [("all",)]


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """Of every side the bytes kept, the distance of its start, its trained values and the seconds of a step."""
    import torch

    model, found, steps = common.host(given), {}, {}
    tokens = torch.randint(10, model.config.vocab_size, (1, given.length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    with torch.no_grad():
        base = float(model(**batch).loss)
    for side in SIDES:
        own = begun(side, copy.deepcopy(model), given.r)
        found[f"kept {side}"] = float(kept(own, batch))
        found[f"start {side}"] = abs(float(own(**batch).loss.detach()) - base)
        found[f"trained {side}"] = float(sum(p.numel() for p in own.adapters["a"].parameters()))
        steps[side] = stepper(own, batch)
    return found | {f"step {side}": value for side, value in common.alternate(steps, given.steps, warm_up=1).items()}


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Return a row for every side."""
    values = found[("all",)]
    rows = [
        (
            side,
            f"{values[f'trained {side}']:,.0f}",
            f"{values[f'kept {side}'] / 2**20:.1f} MiB",
            f"{values[f'kept {side}'] / values[f'kept {LORA}']:.2f}",
            f"{values[f'start {side}']:.1e}",
            f"{values[f'step {side}'] * 1e3:.0f} ms",
            f"{values[f'step {side}'] / values[f'step {LORA}']:.2f}",
        )
        for side in SIDES
    ]
    columns = ("side", "trained", "kept", "/ lora", "start", "step", "/ lora")
    title = f"Training {given.model} ({given.layers} layers) on {given.length} tokens"
    a_a = {"step": values[f"step {AGAIN}"] / values[f"step {LORA}"]}
    return [common.Table(title, columns, rows, [(side,) for side in SIDES], a_a)]


BENCHMARK = common.Benchmark(
    name="side",
    text=__doc__,
    options=(
        common.TEXT_MODEL,
        common.layers(30),
        common.Option("steps", 3, smoke=1, help="timed in each process, all sides in each"),
        common.Option("r", 16, smoke=4, help="how much narrower the side networks are"),
        common.Option("length", 128, smoke=16, help="of the text, in tokens"),
    ),
    jobs=jobs,
    measure=measure,
    tables=tables,
    rooms=common.TRAINING,
)

if __name__ == "__main__":
    BENCHMARK.main()
