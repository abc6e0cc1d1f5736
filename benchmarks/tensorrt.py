"""The cost of building a plan of TensorRT: time, size and host memory by mode; and on a GPU its calls and swaps.

    python -m benchmarks.tensorrt [--model smollm2] [--layers 30] [--dtype float16] [--processes 3]

Every side is a process of its own, which has imported what building takes. Targets: live and fused plans are no larger
than the base's by more than 5 %, and baked ones by nothing. Latency, swaps and refits, beside those of PEFT and of
Torch-TensorRT where that is installed, are a table of machines with a GPU that torch can use, and of no others.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings
from collections.abc import Sequence
from typing import Any

from benchmarks import _peers_on_gpu as peers
from benchmarks import common

BASE, AGAIN, UNTESTED = "base", "base, A/A", "live, no self-test"
SIDES = (BASE, AGAIN, "live", UNTESTED, "fused", "baked")
REFIT = "fused, refit"
DTYPE = common.Option(
    "dtype", "float16", smoke="float32", help="what is computed in", choices=("float32", "float16", "bfloat16")
)
ROUNDS = common.rounds(20)
SHAPE = (1, 16)
_MIB = 1 << 20


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """One side: from a model to an engine; and its calls and swaps, where it can run."""
    if job[0] in peers.found():
        return common.alternate(peers.sides(job[0], given, SHAPE, "cuda"), given.rounds)
    for module in ("lorac.backends.tensorrt.build", "torch.onnx", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)
    model = common.host(given)
    common.forget_peak()
    begun, spent = time.perf_counter(), time.process_time()
    compiled = _compiled(model, job[0], given)
    took = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - spent, "peak": common.peak()}
    took["plan"] = sum(part.file.size for part in compiled.engine.graphs.values()) / _MIB
    return took | _on_gpu(compiled, given)


def _compiled(model: Any, side: str, given: argparse.Namespace) -> Any:
    import lorac

    adapters = {} if side in (BASE, AGAIN) else {"a": lorac.LoRA(r=given.rank, targets="all-linear")}
    mode = next((mode for mode in ("fused", "baked") if side.startswith(mode)), "live")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lorac.LoracWarning)  # that there is no GPU is said in the table
        return lorac.compile(
            model,
            adapters,
            target="tensorrt",
            mode=mode,
            dtype=given.dtype,
            self_test=side not in (AGAIN, BASE, UNTESTED),
            refit=side == REFIT,
        )


def _on_gpu(compiled: Any, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of a call and of two swaps; nothing, where no GPU is here."""
    if not _gpu():
        return {}
    sides = {"call": common.call(compiled, common.tokens(given, SHAPE))}
    if compiled.adapters and (compiled.mode == "fused" or not compiled.engine.constant):
        sides["swap"] = lambda: (compiled.swap("a"), compiled.swap(None))
    return common.alternate(sides, given.rounds)


def _gpu() -> bool:
    """Whether plans run here."""
    from lorac.backends.tensorrt.library import local_capability

    return local_capability() is not None


def _more() -> tuple[str, ...]:
    """Sides that only a GPU has."""
    return (REFIT, *peers.found()) if _gpu() else ()


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Each side beside the base without adapters: what building costs, and on a GPU what running does."""
    base = found[(BASE,)]
    sides = {side: found[(side,)] for (side,) in found}
    built = [side for side in sides if "plan" in sides[side]]
    ratios = {side: {what: sides[side][what] / base[what] for what in ("cpu", "peak", "plan")} for side in built}
    rows = [(side, *_cells(sides[side]), *_ratios(ratios[side])) for side in built]
    columns = ("side", "s", "CPU s", "peak MiB", "plan MiB", "memory ratio", "plan ratio", "CPU ratio")
    notes = () if "call" in base else ("no GPU here: no plan was run, and calls, swaps and refits were not measured",)
    title = f"from {given.model} of {given.layers} layers in {given.dtype} to plans"
    building = common.Table(title, columns, rows, [(side,) for side in built], ratios[AGAIN], notes)
    return [building, _running(sides, given)] if "call" in base else [building]


def _cells(side: Any) -> tuple[str, ...]:
    return f"{side['seconds']:.1f}", f"{side['cpu']:.1f}", f"{side['peak']:.0f}", f"{side['plan']:.1f}"


def _ratios(ratios: Any) -> tuple[str, ...]:
    return f"{ratios['peak']:.2f}", f"{ratios['plan']:.3f}", f"{ratios['cpu']:.2f}"


def _running(sides: Any, given: argparse.Namespace) -> common.Table:
    """Time calls and swaps, lorac's and others'."""
    base = sides[BASE]["call"]
    rows = [
        (side, f"{told['call'] * 1000:.3f}", _swap(told), f"{told['call'] / base:.2f}") for side, told in sides.items()
    ]
    again = {"call": sides[AGAIN]["call"] / base}
    title = f"calls of {common.label(SHAPE)} tokens and swaps on the GPU"
    return common.Table(title, ("side", "call ms", "swap ms", "call ratio"), rows, [(side,) for side in sides], again)


def _swap(told: Any) -> str:
    """Milliseconds of one swap, of two that were timed, there and back."""
    return f"{told['swap'] * 500:.3f}" if "swap" in told else "–"


BENCHMARK = common.Benchmark(
    name="tensorrt",
    text=__doc__,
    options=(common.TEXT_MODEL, common.layers(30), common.RANK, DTYPE, ROUNDS),
    jobs=lambda given: [(side,) for side in (*SIDES, *_more())],
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
)

if __name__ == "__main__":
    BENCHMARK.main()
