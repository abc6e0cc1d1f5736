"""What a plan of TensorRT costs to build: time, size and host memory by mode; and on a GPU its calls and swaps.

    python -m benchmarks.tensorrt [--model smollm2] [--layers 30] [--dtype float16] [--processes 3]

Every side is a process of its own, which has imported what building takes. Targets: live and fused plans are no larger
than the base's by more than 5 %, and baked ones by nothing. Latency and swaps are columns of machines with a GPU that
torch can use, and nowhere else.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from collections.abc import Sequence
from typing import Any

from benchmarks import common

BASE, AGAIN, UNTESTED = "base", "base, A/A", "live, no self-test"
SIDES = (BASE, AGAIN, "live", UNTESTED, "fused", "baked")
DTYPE = common.Option(
    "dtype", "float16", smoke="float32", help="what is computed in", choices=("float32", "float16", "bfloat16")
)
ROUNDS = common.rounds(20)
SHAPE = (1, 16)
_MIB = 1 << 20


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """One side: from a model to an engine; and its calls and swaps, where it can run."""
    for module in ("lorac.backends.tensorrt.build", "torch.onnx", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)
    model = common.host(given)
    common.forget_peak()
    begun, spent = time.perf_counter(), time.process_time()
    compiled = _compiled(model, job[0], given)
    took = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - spent, "peak": common.peak()}
    took["plan"] = sum(part.file.size for part in compiled.engine.parts.values()) / _MIB
    return took | _on_gpu(compiled, given)


def _compiled(model: Any, side: str, given: argparse.Namespace) -> Any:
    import lorac

    adapters = {} if side in (BASE, AGAIN) else {"a": lorac.LoRA(r=given.rank, targets="all-linear")}
    mode = side if side in ("fused", "baked") else "live"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lorac.LoracWarning)  # that there is no GPU is said in the table
        return lorac.compile(
            model,
            adapters,
            target="tensorrt",
            mode=mode,
            dtype=given.dtype,
            self_test=side not in (AGAIN, BASE, UNTESTED),
        )


def _on_gpu(compiled: Any, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of a call and of a swap; nothing, where no GPU is here."""
    from lorac.backends.tensorrt.capabilities import local

    if local() is None:
        return {}
    sides = {"call": common.call(compiled, common.tokens(given, SHAPE))}
    if compiled.adapters and not compiled.engine.constant:
        sides["swap"] = lambda: (compiled.swap("a"), compiled.swap(None))
    return common.alternate(sides, given.rounds)


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Each side beside the base without adapters."""
    base = found[(BASE,)]
    ratios = {side: {what: found[(side,)][what] / base[what] for what in base} for side in SIDES}
    runs = "call" in base
    rows = [(side, *_cells(found[(side,)], runs), *_ratios(ratios[side], runs)) for side in SIDES]
    measured = ("call ms", "swap ms") if runs else ()
    beside = ("call ratio",) if runs else ()
    columns = (
        "side",
        "s",
        "CPU s",
        "peak MiB",
        "plan MiB",
        *measured,
        *beside,
        "memory ratio",
        "plan ratio",
        "CPU ratio",
    )
    notes = () if runs else ("no GPU here: no plan was run, and calls, swaps and refits were not measured",)
    title = f"from {given.model} of {given.layers} layers in {given.dtype} to plans"
    return [common.Table(title, columns, rows, [(side,) for side in SIDES], ratios[AGAIN], notes)]


def _cells(side: Any, runs: bool) -> tuple[str, ...]:
    cells = (f"{side['seconds']:.1f}", f"{side['cpu']:.1f}", f"{side['peak']:.0f}", f"{side['plan']:.1f}")
    if not runs:
        return cells
    swap = f"{side['swap'] * 500:.3f}" if "swap" in side else "–"  # of two swaps, there and back
    return (*cells, f"{side['call'] * 1000:.3f}", swap)


def _ratios(ratios: Any, runs: bool) -> tuple[str, ...]:
    called = (f"{ratios['call']:.2f}",) if runs else ()
    return (*called, f"{ratios['peak']:.2f}", f"{ratios['plan']:.3f}", f"{ratios['cpu']:.2f}")


BENCHMARK = common.Benchmark(
    name="tensorrt",
    text=__doc__,
    options=(common.TEXT_MODEL, common.layers(30), common.RANK, DTYPE, ROUNDS),
    jobs=lambda given: [(side,) for side in SIDES],
    measure=measure,
    tables=tables,
)

if __name__ == "__main__":
    BENCHMARK.main()
