"""Time and peak memory of loading an artifact, compared with a bare session over the same model.

    python -m benchmarks.load [--model smollm2] [--processes 3]

Every side is a process of its own, which has imported torch. Targets: <= 3 of the bare session's time, beyond importing
torch, and <= 1.2 of its memory. Loading checks the hash of every file, which a bare session does not.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

BARE, AGAIN, LORAC = "bare session", "bare session, A/A", "lorac.load"
SIDES = (BARE, AGAIN, LORAC)
MODEL = common.Option("model", "smollm2", smoke="tiny", help="the host", choices=("smollm2", *common.LLAMAS))


def prepare(given: argparse.Namespace) -> None:
    """Write the artifact, unless it is there."""
    if _folder(given).exists():
        return
    import lorac

    compiled = lorac.compile(_model(given), {"a": lorac.LoRA(r=given.rank)}, target="onnxruntime", self_test=False)
    common.away_from_init(compiled.adapters["a"], 0)
    compiled.save(_folder(given))
    os.sync()  # writing it out would cost the first that is measured


def _folder(given: argparse.Namespace) -> Path:
    return Path(given.folder) / f"{given.model}-{given.layers}-{given.rank}"


def _model(given: argparse.Namespace) -> Any:
    if given.model in common.LLAMAS:
        return common.llama(given)
    from examples.models import smollm2

    return smollm2()[0]


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """One side in a process of its own, up to its first answer."""
    import torch

    side, folder = job[0], _folder(given)
    ids = torch.arange(1, 9)[None]
    common.forget_peak()
    begun, spent = time.perf_counter(), time.process_time()
    (_lorac if side == LORAC else _bare)(folder, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    took = {"seconds": time.perf_counter() - begun, "cpu": time.process_time() - spent}
    return {**took, "peak": common.peak()}


def _bare(folder: Path, inputs: Any) -> None:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(folder / "model.onnx", settings)
    session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


def _lorac(folder: Path, inputs: Any) -> None:
    import lorac

    lorac.load(folder)(**inputs)


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Each side beside the bare session."""
    bare = found[(BARE,)]
    ratios = {side: {what: found[(side,)][what] / bare[what] for what in bare} for side in SIDES}
    rows = [
        (
            side,
            f"{found[(side,)]['seconds']:.2f}",
            f"{found[(side,)]['cpu']:.2f}",
            f"{found[(side,)]['peak']:.0f}",
            f"{ratios[side]['peak']:.2f}",
            f"{ratios[side]['cpu']:.2f}",
            f"{ratios[side]['seconds']:.2f}",
        )
        for side in SIDES
    ]
    columns = ("side", "s", "CPU s", "peak MiB", "memory ratio", "CPU ratio", "time ratio")
    title = "from a folder to the first answer, beyond importing torch"
    return [common.Table(title, columns, rows, [(side,) for side in SIDES], ratios[AGAIN])]


BENCHMARK = common.Benchmark(
    name="load",
    text=__doc__,
    options=(MODEL, common.layers(20), common.RANK),
    jobs=lambda given: [(side,) for side in SIDES],
    measure=measure,
    tables=tables,
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
