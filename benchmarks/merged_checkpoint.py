"""Time and memory of merging an adapter into a sharded checkpoint, compared with copying the folder.

    python -m benchmarks.merged_checkpoint [--layers 21] [--shard 1000] [--processes 3]

A Llama in bfloat16, random (of 3 GB at 21 layers), with a LoRA on all linear layers. Every side writes a folder and
flushes it to disk, in a process of its own that has imported the libraries. Targets: <= 1.5 of copying, and <= 1.3 of
the largest shard in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common

COPY, AGAIN, MERGE = "copy", "copy, A/A", "lorac merge"
SIDES = (COPY, AGAIN, MERGE)
SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "vocab_size": 32000}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 128}


def prepare(given: argparse.Namespace) -> None:
    """Write the checkpoint, a shard at a time, and the adapter, unless they are there."""
    folder = Path(given.folder)
    if (folder / "model").exists():
        return
    import torch
    import transformers
    from safetensors.torch import save_file

    sizes = SIZES if given.layers > 1 else SMALL
    kind = {"dtype": "bfloat16", "architectures": ["LlamaForCausalLM"]}
    config = transformers.LlamaConfig(**sizes, **kind, num_hidden_layers=given.layers)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    (folder / "model").mkdir(parents=True)
    config.save_pretrained(folder / "model")
    generator, places = torch.Generator().manual_seed(0), {}
    for number, names in enumerate(_split(model, given.shard), 1):
        shard = f"model-{number:05}.safetensors"
        places |= dict.fromkeys(names, shard)
        shapes = {name: model.get_parameter(name).shape for name in names}
        tensors = {n: (0.02 * torch.randn(s, generator=generator)).bfloat16() for n, s in shapes.items()}
        save_file(tensors, folder / "model" / shard, metadata={"format": "pt"})
    size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    _save_adapter(model, folder / "adapter", given.rank)
    os.sync()


def _split(model, megabytes: int) -> list[list[str]]:
    """Names of parameters for files of up to a size."""
    found, size = [[]], 0
    for name, parameter in model.named_parameters():
        if size + 2 * parameter.numel() > megabytes * 1e6 and found[-1]:
            found, size = [*found, []], 0
        found[-1].append(name)
        size += 2 * parameter.numel()
    return found


def _save_adapter(model, folder: Path, rank: int) -> None:
    import torch

    import lorac

    generator = torch.Generator().manual_seed(1)
    layers = {path: site for path, site in lorac.sites(model).items() if ".layers." in path and site.kind == "linear"}
    tensors = {
        path: {
            "lora_A": 0.02 * torch.randn(rank, site.in_features, generator=generator),
            "lora_B": 0.02 * torch.randn(site.out_features, rank, generator=generator),
        }
        for path, site in layers.items()
    }
    variant = lorac.LoRA(r=rank, alpha=rank, targets=tuple(tensors))
    lorac.save_adapter(lorac.Adapter("adapter", variant, tensors), folder, format="native")


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, float]:
    """One side in a process of its own."""
    import transformers

    from lorac.merging import merge_checkpoint
    from lorac.storage.atomic_folders import flush_folder

    folder = Path(given.folder)
    out = folder / f"out-{os.getpid()}"
    transformers.LlamaForCausalLM  # noqa: B018  (imported with what it needs)

    def write() -> None:
        if job[0] == MERGE:
            merge_checkpoint(folder / "model", folder / "adapter", out)
        else:
            shutil.copytree(folder / "model", out)
            flush_folder(out)

    took = common.measure_call(write, above_start=True)
    shards = [path.stat().st_size / 2**20 for path in out.glob("*.safetensors")]
    shutil.rmtree(out)
    return {**took, "size": sum(shards), "shard": max(shards)}


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Each side beside the copy."""
    bare = found[(COPY,)]
    rows, ratios = [], {}
    for side in SIDES:
        one = found[(side,)]
        ratios[side] = {what: one[what] / max(bare[what], 1e-9) for what in ("seconds", "cpu")}
        rows.append(
            (
                side,
                f"{one['seconds']:.2f}",
                f"{one['cpu']:.2f}",
                f"{ratios[side]['seconds']:.2f}",
                f"{one['peak']:.0f}",
                f"{one['peak'] / one['shard']:.2f}",
            )
        )
    columns = ("side", "s", "CPU s", "time ratio", "MiB above the start", "of the largest shard")
    title = f"a checkpoint of {bare['size']:.0f} MiB, its largest file of {bare['shard']:.0f} MiB"
    return [common.Table(title, columns, rows, [(side,) for side in SIDES], ratios[AGAIN])]


BENCHMARK = common.Benchmark(
    name="merged_checkpoint",
    text=__doc__,
    options=(
        common.layers(21),
        common.Option("shard", 1000, smoke=1, help="megabytes of a file"),
        common.RANK,
    ),
    jobs=lambda given: [(side,) for side in SIDES],
    measure=measure,
    tables=tables,
    rooms=("lorac/formats", "lorac/merging", "lorac/storage"),
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
