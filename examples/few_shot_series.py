"""LLMFew learns to tell nine speakers apart from one or five recordings of each, and runs in ONNX Runtime.

    python -m examples.few_shot_series

The data are JapaneseVowels (12 channels, 25 samples, 9 speakers), which aeon's wheel holds; the trunk is the first
layers of SmolLM2. The method is held against four that lack one of its parts, each on the same draws of recordings;
``--seeds 2`` is a quick look.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import math
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import lorac
from examples import llmfew
from examples.models import package_folder, smollm2

PATCH, STRIDE = 8, 4
LAYERS, HIDDEN, CLASSES = 4, 64, 9
ROWS, STEPS, RATE = 9, 40, 1e-3
LORA = lorac.LoRA(
    r=8, alpha=32, dropout=0.1, targets=["q_proj", "k_proj", "v_proj"], modules_to_save=["encoder", "head"]
)
FULL = "LLMFew"
WITHOUT_LORA = ("without LoRA", "encoder alone")
WAYS = (FULL, *WITHOUT_LORA, "linear patches", "random trunk")
SHOTS = (1, 5)
SEPARATES, ROUNDING = 0.05, 1e-9

console = Console(highlight=False)


@dataclass(frozen=True)
class Series:
    """Recordings (n, channels, length) and the class of each (n,)."""

    values: torch.Tensor
    labels: torch.Tensor


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="draws of recordings (default: 10)")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: 2)")
    given = parser.parse_args()
    smollm2()  # converted once, before the processes ask for it
    console.rule(f"1  five ways, {given.seeds} draws of recordings each")
    begun = time.perf_counter()
    compare(given.seeds, given.workers)
    console.print(f"{time.perf_counter() - begun:.0f} s\n")
    console.rule("2  train once more, export, run in ONNX Runtime")
    deploy()


def compare(seeds: int, workers: int) -> None:
    """Accuracies of all ways, with standard errors over the draws, and which differences separate."""
    jobs = [(way, shots, seed) for seed in range(seeds) for shots in SHOTS for way in WAYS]
    spawning = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawning, torch.set_num_threads, (1,)) as pool:
        accuracies = dict(zip(jobs, pool.map(accuracy, *zip(*jobs, strict=True)), strict=True))
    for shots in SHOTS:
        reached = {way: [accuracies[way, shots, seed] for seed in range(seeds)] for way in WAYS}
        table = Table(f"{shots}-shot", "accuracy", f"{FULL} is ahead by", "")
        for way, of_way in reached.items():
            ahead = [full - other for full, other in zip(reached[FULL], of_way, strict=True)]
            table.add_row(way, average(of_way), *(("", "") if way == FULL else (average(ahead), verdict(ahead))))
        console.print(table)


def average(values: list[float]) -> str:
    """Mean and its standard error, in percent."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{100 * statistics.mean(values):.1f} ± {100 * error:.1f} %"


def verdict(differences: list[float]) -> str:
    """Whether differences on the same draws could be chance."""
    return "" if chance(differences) < SEPARATES else "does not separate"


def chance(differences: list[float]) -> float:
    """How often signs drawn at random bring the mean as far from 0: the exact two-sided test of Fisher."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * len(differences))
    flipped = signs.reshape(-1, len(differences)) @ torch.tensor(differences, dtype=torch.float64)
    return float((flipped.abs() >= abs(sum(differences)) - ROUNDING).double().mean())


def accuracy(way: str, shots: int, seed: int) -> float:
    """Train one way on one draw of recordings; the share of the test's recordings it gets right."""
    drawn, test = recordings(shots, seed)
    model = trained(way, drawn, seed)
    with torch.no_grad():
        return right(model(test.values), test)


def trained(way: str, drawn: Series, seed: int) -> lorac.Compiled | nn.Module:
    """One way's model, trained on the drawn recordings: compiled where LoRA is part of it, else the module itself."""
    torch.manual_seed(seed)
    model = built(way, drawn)
    if way not in WITHOUT_LORA:
        model = lorac.compile(model, {"few": LORA}, example_inputs=(drawn.values[:2],))
    model.train()
    tensors = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(tensors, lr=RATE)
    for _ in range(STEPS):
        rows = torch.randperm(len(drawn.labels))[:ROWS]
        loss = F.cross_entropy(model(drawn.values[rows]), drawn.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def built(way: str, drawn: Series) -> nn.Module:
    """One way's model, its trunk frozen."""
    channels, length = drawn.values.shape[1:]
    trunk = trunk_of(pretrained=way != "random trunk")
    width = trunk.config.hidden_size
    if way == "linear patches":
        encoder: nn.Module = llmfew.LinearPatches(channels, width, PATCH, STRIDE)
    else:
        encoder = llmfew.PatchEncoder(channels, width, PATCH, STRIDE, hidden=HIDDEN, reduced=HIDDEN)
    head = llmfew.Head(llmfew.patches(length, PATCH, STRIDE), width, CLASSES)
    return llmfew.LLMFew(encoder, None if way == "encoder alone" else trunk, head)


@functools.cache
def trunk_of(pretrained: bool) -> nn.Module:
    """Return the first layers of SmolLM2, frozen, or the same with weights drawn anew."""
    from transformers import AutoModel

    trunk = smollm2()[0].model
    trunk.config.num_hidden_layers = LAYERS
    trunk.layers = trunk.layers[:LAYERS]
    if not pretrained:
        trunk = AutoModel.from_config(trunk.config)
    return trunk.eval().requires_grad_(False)


@functools.cache
def recordings(shots: int, seed: int) -> tuple[Series, Series]:
    """So many of each speaker's recordings for training, and all for testing; channels scaled by the training's."""
    folder = package_folder("aeon") / "datasets" / "data" / "JapaneseVowels"
    every, test = (read(folder / f"JapaneseVowels_eq_{part}.ts") for part in ("TRAIN", "TEST"))
    generator = torch.Generator().manual_seed(seed)
    rows = [
        of_one[torch.randperm(len(of_one), generator=generator)[:shots]]
        for of_one in (torch.nonzero(every.labels == label)[:, 0] for label in range(CLASSES))
    ]
    drawn = torch.cat(rows)
    values = every.values[drawn]
    mean, deviation = values.mean((0, 2), keepdim=True), values.std((0, 2), keepdim=True)
    scaled = Series((values - mean) / deviation, every.labels[drawn])
    return scaled, Series((test.values - mean) / deviation, test.labels)


def read(path: Path) -> Series:
    """Read a file in the UEA archive's ``.ts`` format, with series of one length."""
    _, data = path.read_text().split("@data\n")
    values, labels = [], []
    for line in filter(None, data.splitlines()):
        *channels, label = line.split(":")
        values.append([[float(sample) for sample in channel.split(",")] for channel in channels])
        labels.append(int(label) - 1)
    return Series(torch.tensor(values), torch.tensor(labels))


def right(logits: torch.Tensor, test: Series) -> float:
    """Return the share of rows whose largest logit is of the right class."""
    return float((logits.argmax(-1) == test.labels).float().mean())


def deploy() -> None:
    """Export a trained model with its adapter, save it, and classify with what was saved."""
    drawn, test = recordings(SHOTS[-1], 0)
    eager = trained(FULL, drawn, 0)
    assert isinstance(eager, lorac.Compiled)
    with tempfile.TemporaryDirectory() as folder:
        eager.export(target="onnxruntime").save(folder)
        engine = lorac.load(folder)
        table = Table("", "right on the test", "logits from eager's, as a share of what training changed")
        with torch.no_grad():
            base = eager(test.values, adapters=None)
            for label, choice in (("as trained", "few"), ("as before", None)):
                reference, emitted = eager(test.values, adapters=choice), engine(test.values, adapters=choice)
                off = (emitted - reference).norm() / (eager(test.values, adapters="few") - base).norm()
                table.add_row(label, f"{100 * right(emitted, test):.1f} %", f"{off:.1e}")
        console.print(table)


if __name__ == "__main__":
    main()
