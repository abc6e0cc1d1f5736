"""What compiling costs beside the plain transformers ONNX export of the same model: time and peak memory.

    python -m benchmarks.compile [--layers 20] [--processes 3]

Targets, self-test included, without settling: <= 1.2 of the time and of the peak memory (fused: plus the touched
weights once). The side without a self-test says what holding the program against the model, and the emitted program
against it, costs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

PLAIN, AGAIN = "plain export", "plain export, A/A"
UNTESTED = "lorac live, no self-test"
SIDES = (PLAIN, AGAIN, "lorac live", UNTESTED, "lorac fused")


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """One side in a process of its own, up to a session that answers."""
    import transformers.exporters.exporter_onnx  # noqa: F401  (both sides need it: not part of the comparison)

    (side,) = job
    model = common.llama(given)
    work = _plain if side in (PLAIN, AGAIN) else _lorac
    seconds = common.seconds(lambda: work(model, side))
    return {"seconds": seconds, "peak": common.peak()}


def _plain(model: Any, side: str) -> None:
    import onnxruntime as ort

    from lorac.backends.onnxruntime.options import Options
    from lorac.backends.onnxruntime.session import session_options

    with tempfile.TemporaryDirectory() as folder:
        common.plain_export(model, Path(folder, "plain.onnx"))
        ort.InferenceSession(Path(folder, "plain.onnx"), session_options(Options()))


def _lorac(model: Any, side: str) -> None:
    import lorac

    mode = "fused" if side == "lorac fused" else "live"
    adapters = {"a": lorac.LoRA(r=16, alpha=16)}
    lorac.compile(model, adapters, target="onnxruntime", mode=mode, self_test=side != UNTESTED)


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Each side beside the plain export."""
    plain = found[(PLAIN,)]
    ratios = {side: {what: found[(side,)][what] / plain[what] for what in plain} for side in SIDES}
    rows = [
        (
            side,
            f"{found[(side,)]['seconds']:.1f}",
            f"{found[(side,)]['peak']:.0f}",
            f"{ratios[side]['peak']:.2f}",
            f"{ratios[side]['seconds']:.2f}",
        )
        for side in SIDES
    ]
    columns = ("side", "s", "peak MiB", "memory ratio", "time ratio")
    return [common.Table("from model to session", columns, rows, [(side,) for side in SIDES], ratios[AGAIN])]


BENCHMARK = common.Benchmark(
    name="compile",
    text=__doc__,
    options=(common.MODEL, common.layers(20)),
    jobs=lambda given: [(side,) for side in SIDES],
    measure=measure,
    tables=tables,
)

if __name__ == "__main__":
    BENCHMARK.main()
