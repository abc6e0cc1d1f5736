"""Time to the first token behind a long prompt that the base has read: SmolLM2-135M in ONNX Runtime, on the CPU.

    python -m benchmarks.invocation [--length 1000] [--layers 30] [--rank 16] [--rounds 5] [--processes 3] [--clock cpu]

A LoRA with invocation tokens (PEFT's aLoRA) begins with the base's keys and values of the prompt before these, which a
``lorac.PromptCache`` holds; without the cache, and with a plain LoRA, whose keys and values are its own, the whole
prompt is read. Target: the cache makes the first token >= 5x sooner.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import common

REUSED, AGAIN, WHOLE, PLAIN = (
    "aLoRA, the base's prompt reused",
    "A/A: aLoRA, the base's prompt reused",
    "aLoRA, the whole prompt read",
    "LoRA beside the base's prompt",
)
SIDES = (REUSED, AGAIN, WHOLE, PLAIN)
INVOCATION = (7, 11, 5)


def jobs(given: argparse.Namespace) -> Sequence[common.Job]:
    """One, of all sides."""
    return [("all",)]


def measure(job: common.Job, given: argparse.Namespace) -> Mapping[str, float]:
    """Seconds to the first token of every side."""
    import torch

    import lorac

    model = common.host(given)
    variants = {"invoked": INVOCATION, "plain": ()}
    eager = lorac.compile(
        model,
        {n: lorac.LoRA(r=given.rank, alpha=given.rank, invocation_tokens=ids) for n, ids in variants.items()},
    )
    for seed, adapter in enumerate(eager.adapters.values()):
        common.away_from_init(adapter, seed)
    compiled = lorac.compile(model, [*eager.adapters.values()], target="onnxruntime", cache=True, active=None)
    read = torch.from_numpy(common.tokens(given, (1, given.length))["input_ids"]).clamp(min=20)
    prompt = torch.cat([read, torch.tensor([INVOCATION])], 1)
    options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None}
    caches = [lorac.PromptCache(1 << 31) for _ in range(3)]
    for cache in caches:
        compiled.generate(read, adapters=None, prompt_cache=cache, **options)

    def first(name: str, cache: Any = None) -> Any:
        return compiled.generate(prompt, adapters=name, prompt_cache=cache, **options)

    def plain() -> None:
        first("plain", caches[2])
        caches[2].forget(compiled.engine, "plain")

    first("invoked", caches[0]), first("invoked", caches[1])
    assert torch.equal(first("invoked", caches[0]), first("invoked")), "the reused prompt gives another token"
    sides: dict[str, common.Side] = {
        REUSED: lambda: first("invoked", caches[0]),
        AGAIN: lambda: first("invoked", caches[1]),
        WHOLE: lambda: first("invoked"),
        PLAIN: plain,
    }
    return common.alternate(sides, given.rounds, clock=common.CLOCKS[given.clock])


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Return a row for every side, its ratio to the reused prompt last."""
    times = found[("all",)]
    rows = [(side, f"{times[side] * 1e3:.1f} ms", f"{times[side] / times[REUSED]:.2f}") for side in SIDES]
    title = f"First token behind {given.length} tokens and {len(INVOCATION)} of an invocation, {given.model}"
    title += f" ({given.layers} layers)"
    a_a = {"first token": times[REUSED] / times[AGAIN]}
    return [common.Table(title, ("side", "first token", "/ reused"), rows, [(side,) for side in SIDES], a_a)]


BENCHMARK = common.Benchmark(
    name="invocation",
    text=__doc__,
    options=(
        common.TEXT_MODEL,
        common.layers(30),
        common.Option("length", 1000, smoke=24, help="of the prompt that the base has read, in tokens"),
        common.Option("rank", 16, smoke=2, help="of the adapters"),
        common.rounds(5),
        common.CLOCK,
    ),
    jobs=jobs,
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
)

if __name__ == "__main__":
    BENCHMARK.main()
