"""The cost of compiling: next to the plain transformers ONNX export, next to genai's builder, and by number of layers.

    python -m benchmarks.compile [--layers 20] [--processes 3] [--only TABLE ...] [--genai FOLDER]

Next to the export: time and peak memory. Targets with the self-test: <= 1.2 of both, in fused mode plus the touched
weights once. The side without a self-test shows what the comparisons of program, model and emitted program cost.

Next to the builder: CPU time from a folder of SmolLM2 and a LoRA on all its linear layers to a session that generates,
without imports and with them. Imports on the way are counted apart on every side (``benchmarks._imports``), since the
builder imports at its top and lorac when it first needs a library. Targets: <= 12 CPU-seconds and <= 2.5 of the
builder's.

By layers: CPU time for a narrow model of 2 to 60 layers that generates. Target: linear.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _genai, common
from benchmarks._imports import Imports

PLAIN, AGAIN = "plain export", "plain export, A/A"
UNTESTED = "lorac live, no self-test"
SIDES = (PLAIN, AGAIN, "lorac live", UNTESTED, "lorac fused")
WRITES, BUILDER, BUILDER_BASE = "lorac live, cache", "genai builder, adapter", "genai builder, no adapter"
WRITERS = (BUILDER, BUILDER_BASE, WRITES)
TABLES = ("export", "builder", "layers")
SERIES = ("2", "8", "20", "40", "60")
LEAST, MOST = 12.0, 2.5
"""Targets next to the builder: CPU-seconds, and as a multiple of the builder's."""


def jobs(options: argparse.Namespace) -> Sequence[common.Job]:
    """Return a job for every side and every number of layers, each for a process of its own."""
    writers = [side for side in WRITERS if side == WRITES or _genai.found(options)]
    sides = {"export": SIDES, "builder": writers, "layers": options.series}
    return [(table, side) for table in options.only for side in sides[table]]


def prepare(options: argparse.Namespace) -> None:
    """Write the model and the adapter that the builder reads, unless they are there."""
    writer, folder = _writer_options(options), Path(options.folder)
    if "builder" not in options.only or (folder / "adapter").exists():
        return
    common.save_host(common.host(writer), folder / "model", writer)
    common.save_peft(folder / "adapter", writer)


def _writer_options(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options of the model that generates."""
    layers = 30 if options.writer == common.SMOLLM2 else 1
    return argparse.Namespace(model=options.writer, layers=layers, rank=options.rank)


def measure(job: common.Job, options: argparse.Namespace) -> dict[str, float]:
    """Measure one side in a process of its own."""
    table, side = job
    if table == "export":
        return _measure_export(side, options)
    for module in ("lorac.backends.onnxruntime.backend", "torch.onnx", "transformers.models.llama.modeling_llama"):
        importlib.import_module(module)
    if table == "layers":
        return _measure_layers(int(side), options)
    return _measure_builder(side, options)


# ── Next to the export ────────────────────────────────────────────────────────────────────────────────────────────────
def _measure_export(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure the time and memory up to a session that runs."""
    import transformers.exporters.exporter_onnx  # noqa: F401  (both sides need it: not part of the comparison)

    model = common.llama(options)
    work = _plain if side in (PLAIN, AGAIN) else _lorac
    seconds = common.seconds(lambda: work(model, side))
    return {"seconds": seconds, "peak": common.peak()}


def _plain(model: Any, side: str) -> None:
    import onnxruntime as ort

    from lorac.backends.onnxruntime.inference_session import session_options
    from lorac.backends.onnxruntime.options import OnnxRuntimeOptions

    with tempfile.TemporaryDirectory() as folder:
        common.plain_export(model, Path(folder, "plain.onnx"))
        ort.InferenceSession(Path(folder, "plain.onnx"), session_options(OnnxRuntimeOptions()))


def _lorac(model: Any, side: str) -> None:
    import lorac

    mode = "fused" if side == "lorac fused" else "live"
    adapters = {"a": lorac.LoRA(r=16, alpha=16)}
    lorac.compile(model, adapters, target="onnxruntime", mode=mode, self_test=side != UNTESTED)


def _export_table(found: common.Found, options: argparse.Namespace) -> common.Table:
    """Compare each side with the plain export."""
    sides = {side: found[("export", side)] for side in SIDES}
    plain = sides[PLAIN]
    ratios = {side: {what: sides[side][what] / plain[what] for what in plain} for side in SIDES}
    rows = [
        (
            side,
            f"{sides[side]['seconds']:.1f}",
            f"{sides[side]['peak']:.0f}",
            f"{ratios[side]['peak']:.2f}",
            f"{ratios[side]['seconds']:.2f}",
        )
        for side in SIDES
    ]
    columns = ("side", "s", "peak MiB", "memory ratio", "time ratio")
    return common.Table("from model to session", columns, rows, [(side,) for side in SIDES], ratios[AGAIN])


# ── Next to genai's builder ───────────────────────────────────────────────────────────────────────────────────────────
def _measure_builder(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure the CPU-seconds from a folder to a session that generates, without imports, and of the whole process."""
    folder = Path(options.folder)
    if side != WRITES:
        assert _genai.found(options)
        importlib.import_module("onnxruntime_genai.models.builder")
    imports, begun = Imports(time.process_time), time.process_time()
    with tempfile.TemporaryDirectory() as out, imports.counted():
        if side == WRITES:
            _compile_writer(folder)
        else:
            _genai.build(folder / "model", Path(out), adapter=folder / "adapter" if side == BUILDER else None)
            _genai.load(Path(out), threads=1)
    ended = time.process_time()
    return {"beyond": ended - begun - imports.seconds, "imports": imports.seconds, "whole": ended}


def _compile_writer(folder: Path) -> None:
    import lorac

    lorac.compile(common.saved_host(folder / "model"), {"a": folder / "adapter"}, target="onnxruntime", cache=True)


def _builder_table(found: common.Found, options: argparse.Namespace) -> common.Table:
    """Compare each side with the builder and the same adapter."""
    costs = {side: found.get(("builder", side)) for side in WRITERS}
    rows = [(side, *_compare(costs[side], costs[BUILDER])) for side in WRITERS]
    columns = ("side", "CPU s", "imports on the way", "with all imports", "ratio with imports", "ratio")
    title = f"from a folder of {options.writer} to a session that writes; targets <= {LEAST:.0f} CPU s and <= {MOST}"
    return common.Table(title, columns, rows, [(side,) for side in WRITERS], {}, [_genai.note(options)])


def _compare(side: Any, other: Any) -> tuple[str, ...]:
    if side is None:
        return ("-",) * 5
    ratios = (f"{side[what] / other[what]:.2f}" if other else "-" for what in ("whole", "beyond"))
    return *(f"{side[what]:.1f}" for what in ("beyond", "imports", "whole")), *ratios


# ── By layers ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _measure_layers(layers: int, options: argparse.Namespace) -> dict[str, float]:
    """Measure the CPU-seconds to compile a narrow model that generates."""
    import lorac

    model = common.llama(argparse.Namespace(model="tiny", layers=layers))
    begun = time.process_time()
    lorac.compile(model, {"a": lorac.LoRA(r=options.rank)}, target="onnxruntime", cache=True)
    return {"seconds": time.process_time() - begun}


def _layers_table(found: common.Found, options: argparse.Namespace) -> common.Table:
    """Compare every number of layers with the straight line that fits best."""
    counts = [int(layers) for layers in options.series]
    seconds = [found[("layers", layers)]["seconds"] for layers in options.series]
    slope, start = statistics.linear_regression(counts, seconds)
    fitted = [start + slope * count for count in counts]
    rows = [
        (f"{count}", f"{took:.2f}", f"{fit:.2f}", f"{took / fit:.3f}")
        for count, took, fit in zip(counts, seconds, fitted, strict=True)
    ]
    line = f"CPU s = {start:.2f} + {slope:.3f} per layer; correlation {statistics.correlation(counts, seconds):.4f}"
    columns = ("layers", "CPU s", "line", "of the line")
    title = "a narrow model that writes text; target: linear"
    return common.Table(title, columns, rows, [(layers,) for layers in options.series], {}, [line])


def tables(found: common.Found, options: argparse.Namespace) -> Sequence[common.Table]:
    """Return the tables that the options name."""
    every = {"export": _export_table, "builder": _builder_table, "layers": _layers_table}
    return [every[name](found, options) for name in options.only]


BENCHMARK = common.Benchmark(
    name="compile",
    text=__doc__,
    options=(
        common.MODEL,
        common.layers(20),
        common.RANK,
        common.Option(
            "writer", common.SMOLLM2, smoke="tiny", help="the model that generates", choices=(common.SMOLLM2, "tiny")
        ),
        common.Option("series", SERIES, smoke=("1", "2"), help="these numbers of layers", choices=("1", *SERIES)),
        common.Option("only", TABLES, smoke=TABLES, help="these tables"),
        _genai.OPTION,
    ),
    jobs=jobs,
    measure=measure,
    tables=tables,
    rooms=("lorac/backends", "lorac/frontend", "lorac/ir", "lorac/passes", "lorac/session"),
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
