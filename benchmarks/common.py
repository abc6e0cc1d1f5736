"""What every benchmark shares: the model, fresh processes, alternating sides, medians, one table with the ratio last.

Every figure is the median over processes of the median over rounds; within a round all sides run in shuffled order
through the same kind of call. The A/A row is the base against a second session of the base: its distance from 1 is what
the machine's noise is worth.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Side = Callable[[], Any]
# Sessions of one model in one process differ by the pages they land on; huge pages make them alike.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "HF_HUB_OFFLINE": "1"}


def llama_170m(layers: int = 20) -> Any:
    """A randomly initialised Llama of 166 M parameters (20 layers, hidden 768, tied embeddings)."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=32000,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).eval()


def away_from_init(adapter: Any, seed: int) -> None:
    """Give an adapter's tensors small random values, as training would."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensors in adapter.tensors.values():
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and name != "magnitude":
                    tensor.normal_(0, 0.02, generator=generator)


def alternate(sides: Mapping[str, Side], rounds: int, warm_up: int = 2) -> dict[str, float]:
    """Seconds per call of each side: the median over rounds, order shuffled in each."""
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warm_up):
        for name in names:
            sides[name]()
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            begun = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[name]) for name in sides}


def in_fresh_process(module: str, *arguments: str) -> Any:
    """Run ``python -m module arguments`` and read the JSON of its last line."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median over processes, key by key."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table; it fits a terminal, a log and a closing note alike."""
    widths = [max(len(str(row[i])) for row in (columns, *rows)) for i in range(len(columns))]
    print(f"\n{title}")
    for row in (columns, ["-" * width for width in widths], *rows):
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
