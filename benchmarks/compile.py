"""What compiling costs beside the plain transformers ONNX export of the same model: time and peak memory.

    python -m benchmarks.compile [--layers 20] [--processes 3]

Targets, self-test included, without settling: <= 1.2 of the time and of the peak memory (fused: plus the touched
weights once).
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from benchmarks import common

SIDES = ("plain export", "lorac live", "lorac fused")


def worker(side: str, layers: int) -> dict[str, float]:
    """One side in a process of its own, up to a session that answers."""
    import torch
    import transformers.exporters.exporter_onnx  # noqa: F401  (both sides need it: not part of the comparison)

    import lorac
    from benchmarks.overhead import _plain_session, plain_export

    model = common.llama_170m(layers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    if side == "plain export":
        with tempfile.TemporaryDirectory() as folder:
            plain_export(model, Path(folder) / "plain.onnx", torch)
            _plain_session(Path(folder) / "plain.onnx")
    else:
        mode = side.split()[1]
        lorac.compile(model, {"a": lorac.LoRA(r=16, alpha=16)}, target="onnxruntime", mode=mode)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak": peak / 1024, "before": before / 1024}


def main() -> None:
    """Alternate the sides over fresh processes and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(worker(given.worker, given.layers)))
        return
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(given.processes):
        for side in SIDES:
            arguments = ("--worker", side, "--layers", str(given.layers))
            runs[side].append(common.in_fresh_process("benchmarks.compile", *arguments))
    found = {side: common.medians(side_runs) for side, side_runs in runs.items()}
    plain = found["plain export"]
    rows = [
        (
            side,
            f"{row['seconds']:.1f}",
            f"{row['peak']:.0f}",
            f"{row['peak'] / plain['peak']:.2f}",
            f"{row['seconds'] / plain['seconds']:.2f}",
        )
        for side, row in found.items()
    ]
    common.print_table("from model to session", ("side", "s", "peak MiB", "memory ratio", "time ratio"), rows)


if __name__ == "__main__":
    main()
