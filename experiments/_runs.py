"""Trainings that are kept one by one, so that an experiment that was stopped goes on, and run in several processes."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from experiments._kept import KEPT, digest
from experiments._lora_variants import ways
from lorac.progress import progress


class Run(NamedTuple):
    """One training."""

    way: str
    rate: float
    seed: int
    steps: int


def train(run: Run) -> tuple[float, float]:
    """Return the loss after a training, and the seconds of processor time that it took."""
    torch.set_num_threads(1)
    begun = time.process_time()
    loss = ways()[run.way].train(run.rate, run.seed, run.steps)
    return loss, time.process_time() - begun


class Runs:
    """Trainings by what was asked for, of this run of the experiment and of those before it."""

    def __init__(self, kept: Path | None) -> None:
        self.kept, self.done = kept, dict[Run, tuple[float, float]]()
        if kept is not None and kept.exists():
            for line in kept.read_text(encoding="utf-8").splitlines():
                run, result = json.loads(line)
                self.done[Run(*run)] = result[0], result[1]

    def ask(self, wanted: Iterable[Run]) -> None:
        """Run what was not run, in this process if nothing is kept, else in one for each core."""
        new = [run for run in dict.fromkeys(wanted) if run not in self.done]
        if self.kept is None:
            self.done |= {run: train(run) for run in new}
            return
        with self.kept.open("a", encoding="utf-8") as file, progress("experiment", total=len(new)) as report:
            for run, result in zip(new, self.pool.map(train, new), strict=True):
                report.step(f"{run.way} at {run.rate:g}")
                self.done[run] = result
                print(json.dumps([run, result]), file=file, flush=True)

    @functools.cached_property
    def pool(self) -> ProcessPoolExecutor:
        """A process for each core."""
        return ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn"))

    def losses(self, way: str, rate: float, seeds: Iterable[int], steps: int) -> list[float]:
        """Return the losses of a way of training at a rate."""
        return [self.done[Run(way, rate, seed, steps)][0] for seed in seeds]


def kept_runs(name: str) -> Path:
    """Return the file that an experiment's runs are kept in while its code stays as it is."""
    folder = KEPT / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{digest(name)[:16]}.jsonl"
