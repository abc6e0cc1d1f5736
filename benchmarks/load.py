"""Time and peak memory of loading an artifact, compared with a bare session over the same model; then of generating.

    python -m benchmarks.load [--model smollm2] [--processes 3]

Every side is a process of its own, which has imported torch and answers once, by a call or by text over a cache. Peak
memory counts pages of mapped files; anonymous memory, taken after the answer, does not. Targets: <= 3 of the bare
session's time, beyond importing torch, and <= 1.2 of its memory; what generates and has its weights prepacked in files
keeps <= 1.3 of the model's bytes in anonymous memory. Loading checks the hash of every file, which a bare session does
not.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

BARE, AGAIN, LORAC = "bare session", "bare session, A/A", "lorac.load"
PREPACKED = "lorac.load, prepacked="
SIDES = (BARE, AGAIN, LORAC, PREPACKED)
GENERATES = (LORAC, PREPACKED)
CALL, TEXT, BYTES, FILES = "call", "text", "bytes", "prepacked"
"""In the folder: an artifact that is called, one that generates, the model's bytes, prepacked weights of both."""
MODEL = common.Option("model", "smollm2", smoke="tiny", help="the host", choices=("smollm2", *common.LLAMAS))


def prepare(given: argparse.Namespace) -> None:
    """Write the artifact, unless it is there."""
    if _folder(given).exists():
        return
    import lorac

    model, folder = _model(given), _folder(given)
    for cache, path in {False: folder / CALL, True: folder / TEXT}.items():
        adapters = {"a": lorac.LoRA(r=given.rank)}
        compiled = lorac.compile(model, adapters, target="onnxruntime", cache=cache, self_test=False)
        common.away_from_init(compiled.adapters["a"], 0)
        compiled.save(path)
        lorac.load(path, prepacked=folder / FILES)
    (folder / BYTES).write_text(str(sum(one.nbytes for one in model.parameters())))
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

    side, program = job
    ids = torch.arange(1, 9)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if side in {BARE, AGAIN}:
        return common.measure_call(lambda: _bare(_folder(given) / program, inputs))
    options = {"prepacked": _folder(given) / FILES} if side == PREPACKED else {}
    program_folder, generates = _folder(given) / program, program == TEXT
    found = common.measure_call(lambda: _lorac(program_folder, inputs, options, generates=generates))
    return {**found, "model": int((_folder(given) / BYTES).read_text()) / 2**20}


def _bare(folder: Path, inputs: Any) -> object:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(folder / "model.onnx", settings)
    session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return session


def _lorac(folder: Path, inputs: Any, options: Mapping[str, Path], *, generates: bool) -> object:
    import lorac

    compiled = lorac.load(folder, **options)
    if generates:
        compiled.generate(**inputs, max_new_tokens=16, do_sample=False)
    else:
        compiled(**inputs)
    return compiled


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Each side beside the bare session; then how much memory each that generates keeps, beside the model's bytes."""
    calls = {(side,): found[side, CALL] for side in SIDES}
    whole = found[LORAC, TEXT]["model"]
    rows = [
        (side, *(f"{value:.0f}" for value in kept), *(f"{value / whole:.2f}" for value in kept))
        for side in GENERATES
        for kept in [(found[side, TEXT]["anonymous"], found[side, TEXT]["peak"])]
    ]
    columns = ("side", "anonymous MiB", "peak MiB", "anonymous / model", "peak / model")
    promised = [(side,) for side in GENERATES]
    note = f"the model has {whole:.0f} MiB; a process that has imported torch alone is part of each figure"
    return [
        common.compare_sides("from a folder to the first answer, beyond importing torch", calls, SIDES),
        common.Table("memory of a process that has generated", columns, rows, promised, {}, [note]),
    ]


BENCHMARK = common.Benchmark(
    name="load",
    text=__doc__,
    options=(MODEL, common.layers(20), common.RANK),
    jobs=lambda given: [*((side, CALL) for side in SIDES), *((side, TEXT) for side in GENERATES)],
    measure=measure,
    tables=tables,
    rooms=(*common.PROGRAM, "lorac/storage"),
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
