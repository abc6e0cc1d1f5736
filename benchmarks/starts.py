"""The cost of a start, and of a training step after it, in lorac's eager target and in PEFT: SmolLM2-135M on the CPU.

    python -m benchmarks.starts [--steps 5] [--length 128] [--batches 2] [--layers 30] [--processes 3] [--only NAME ...]

Both sides begin the same LoRA of q and v by the same rule, PEFT over a base that it rewrites, lorac over the base and a
residual, and train it on the same tokens with AdamW. The start is timed once in each process, in turn; steps
alternate. "plain" is a step of lorac's LoRA that begins as usual. Target: a step <= 1.1 of PEFT's.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import common

TARGETS = ("q_proj", "v_proj")
CASES = ("pissa", "olora", "lora_ga", "eva")
LORAC, PEFT, AGAIN, PLAIN = SIDES = ("lorac", "peft", "peft again", "plain")


def begun(side: str, case: str, model: Any, batches: list[Any]) -> Any:
    """Return a model with an adapter at its start."""
    return _peft(case, model, batches) if side in (PEFT, AGAIN) else _lorac(case, model, batches, plain=side == PLAIN)


def _lorac(case: str, model: Any, batches: list[Any], *, plain: bool) -> Any:
    import lorac
    from lorac.training import initialisation as starts

    rules = {"pissa": starts.PiSSA(), "olora": starts.OLoRA(), "lora_ga": starts.LoRAGA(peft=True), "eva": starts.EVA()}
    variant = lorac.LoRA(r=8, alpha=16, targets=TARGETS)
    return lorac.compile(model, {"a": variant if plain else rules[case](variant, model, batches)})


def _peft(case: str, model: Any, batches: list[Any]) -> Any:
    import peft
    from peft.tuners.lora.loraga import preprocess_loraga

    given = {"lora_ga_config": peft.LoraGAConfig()} if case == "lora_ga" else {}
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS), init_lora_weights=case, **given)
    if case == "lora_ga":
        # PEFT counts batches by hooks that fire as they should only where inputs want gradients.
        model.enable_input_require_grads()
        preprocess_loraga(model, config, lambda: [model(**batch).loss.backward() for batch in batches])
        model.disable_input_require_grads()
    wrapped = peft.get_peft_model(model, config)
    if case == "eva":
        peft.initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False)
    return wrapped


def stepper(wrapped: Any, batch: Any) -> Callable[[], Any]:
    """Return a function that trains one step."""
    import torch

    wrapped.train()
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        wrapped(**batch).loss.backward()
        optimizer.step()

    return step


def jobs(given: argparse.Namespace) -> Sequence[common.Job]:
    """One for each start."""
    return [(case,) for case in given.only]


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of every side's start, and of a step after it."""
    import torch

    (case,) = job
    model, found, steps = common.host(given), {}, {}
    generator = torch.Generator().manual_seed(0)
    drawn = [
        torch.randint(10, model.config.vocab_size, (1, given.length), generator=generator) for _ in range(given.batches)
    ]
    if case == "eva":
        drawn = drawn[:1]  # PEFT goes round its batches until the components stay, and over two they never do
    batches = [{"input_ids": tokens, "labels": tokens} for tokens in drawn]
    begun(PEFT, case, copy.deepcopy(model), batches)
    for side in SIDES:
        own, made = copy.deepcopy(model), []
        found[f"start {side}"] = common.seconds(
            lambda own=own, side=side, made=made: made.append(begun(side, case, own, batches))
        )
        steps[side] = stepper(made[0], batches[0])
    return found | {f"step {side}": value for side, value in common.alternate(steps, given.steps, warm_up=1).items()}


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """One row for the start and one for the step of every case."""
    rows, a_a = [], {}
    for case in given.only:
        values = found[(case,)]
        for what, unit, factor in (("start", "s", 1.0), ("step", "ms", 1e3)):
            own = {side: values[f"{what} {side}"] for side in SIDES}
            again, ratio = own[AGAIN] / own[PEFT], own[LORAC] / own[PEFT]
            sides = (f"{own[side] * factor:.{2 if what == 'start' else 0}f} {unit}" for side in (LORAC, PLAIN, PEFT))
            rows.append((case, what, *sides, f"{again:.2f}", f"{ratio:.2f}"))
            a_a[f"{case}, {what}"] = again
    columns = ("start", "", "lorac", "plain", "peft", "A/A", "lorac / peft")
    title = (
        f"Starts of {given.model} ({given.layers} layers), r = 8 on q and v, {given.batches} x {given.length} tokens"
    )
    return [
        common.Table(title, columns, rows, [(case, what) for case in given.only for what in ("start", "step")], a_a)
    ]


BENCHMARK = common.Benchmark(
    name="starts",
    text=__doc__,
    options=(
        common.TEXT_MODEL,
        common.layers(30),
        common.Option("steps", 5, smoke=1, help="timed in each process, all sides in each"),
        common.Option("length", 128, smoke=16, help="of a batch, in tokens"),
        common.Option("batches", 2, smoke=1, help="that a start reads"),
        common.Option("only", CASES, smoke=("olora", "eva"), help="these starts"),
    ),
    jobs=jobs,
    measure=measure,
    tables=tables,
    rooms=common.TRAINING,
)

if __name__ == "__main__":
    BENCHMARK.main()
