"""Time and peak memory of loading an artifact, compared with a bare session over the same model.

    python -m benchmarks.load [--model smollm2] [--processes 3]

Every side is a process of its own, which has imported torch and answers once. Peak memory counts pages of mapped files;
anonymous memory, taken after the answer, does not. Targets: <= 3 of the bare session's time, beyond importing
torch, and <= 1.2 of its memory. Loading checks the hash of every file, which a bare session does not.
"""

from __future__ import annotations

import argparse
import os
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
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return common.measure_call(lambda: (_lorac if side == LORAC else _bare)(folder, inputs))


def _bare(folder: Path, inputs: Any) -> object:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(folder / "model.onnx", settings)
    session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return session


def _lorac(folder: Path, inputs: Any) -> object:
    import lorac

    compiled = lorac.load(folder)
    compiled(**inputs)
    return compiled


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Each side beside the bare session."""
    return [common.compare_sides("from a folder to the first answer, beyond importing torch", found, SIDES)]


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
