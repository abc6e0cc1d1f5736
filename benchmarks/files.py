"""Time and peak memory of reading an adapter's file, compared with safetensors' own reader.

    python -m benchmarks.files [--megabytes 200] [--processes 3]

Every side is a process of its own, which has imported torch and lorac. safetensors maps a file and reads nothing until
a value is used, so its side copies every tensor into memory. Target: <= 1.2 of its time and of its memory for a file
that PEFT wrote. A file of lorac's own is hashed besides, so that no number in it can change unnoticed; one side does
nothing but hash a file in memory, with as many threads.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common

BARE, AGAIN, PEFT, NATIVE = "safetensors", "safetensors, A/A", "of PEFT", "lorac's own, sealed"
HASH = "hashing alone"
SIDES = (BARE, AGAIN, PEFT, NATIVE, HASH)
MEGABYTES = common.Option("megabytes", 200, smoke=1, help="size of the file")
_WIDTH, _RANK = 2048, 16
_WEIGHTS = "adapter_model.safetensors"


def prepare(given: argparse.Namespace) -> None:
    """Write the files, unless they are there."""
    if _folder(given).exists():
        return
    import torch
    from safetensors.torch import save_file

    import lorac

    generator = torch.Generator().manual_seed(0)
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": ["q_proj"]}
    for size, layers in (("small", 1), ("large", max(1, given.megabytes * 10**6 // (8 * _WIDTH * _RANK)))):
        folder, tensors = _folder(given) / size, {}
        (folder / "peft").mkdir(parents=True)
        for path in (f"base_model.model.layers.{layer}.q_proj" for layer in range(layers)):
            tensors[f"{path}.lora_A.weight"] = torch.randn(_RANK, _WIDTH, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(_WIDTH, _RANK, generator=generator)
        save_file(tensors, folder / "peft" / _WEIGHTS)
        (folder / "peft" / "adapter_config.json").write_text(json.dumps(config))
        lorac.save_adapter(lorac.load_adapter(folder / "peft"), folder / "native.safetensors", "native")
    os.sync()  # writing it out would cost the first that is measured


def _folder(given: argparse.Namespace) -> Path:
    return Path(given.folder) / f"files-{given.megabytes}"


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """One side in a process of its own, which has read a small file; the large one is in the system's cache."""
    side, folder = job[0], _folder(given)
    for file in (folder / "large").rglob("*.safetensors"):
        file.read_bytes()
    if side == HASH:
        return _measure_hashing(folder / "large")
    _read(side, folder / "small")
    return common.measure_call(lambda: _read(side, folder / "large"), above_start=True)


def _measure_hashing(folder: Path) -> dict[str, float]:
    from lorac.formats.reading import AdapterFile
    from lorac.storage.tensor_hash import hash_contents

    tensors = AdapterFile(folder / "peft" / _WEIGHTS).read_tensors()
    return common.measure_call(lambda: hash_contents("", tensors), above_start=True)


def _read(side: str, folder: Path) -> object:
    from safetensors.torch import load_file

    import lorac

    if side in (BARE, AGAIN):
        return {name: tensor.clone() for name, tensor in load_file(folder / "peft" / _WEIGHTS).items()}
    return lorac.load_adapter(folder / ("peft" if side == PEFT else "native.safetensors"))


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Each side beside safetensors' own reader."""
    return [common.compare_sides(f"reading {given.megabytes} MB into memory", found, SIDES)]


BENCHMARK = common.Benchmark(
    name="files",
    text=__doc__,
    options=(MEGABYTES,),
    jobs=lambda given: [(side,) for side in SIDES],
    measure=measure,
    tables=tables,
    rooms=("lorac/formats", "lorac/storage"),
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
