"""A call and a swap of target aoti, compared with torch's own package of the same base.

    python -m benchmarks.aoti [--layers 8] [--rank 16] [--rounds 15] [--processes 3] [--folder FOLDER]

Targets: lorac's program with its adapter off <= 1.10 of the plain package; a swap <= 2 ms.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

SHAPES = ((1, 1), (1, 16), (1, 128), (8, 1), (8, 32))
SIDES = ("live", "live, none")
PLAIN, AGAIN, SWAP = "plain", "plain, A/A", "swap"


def prepare(given: argparse.Namespace) -> None:
    """Compile both programs once; processes load them."""
    import torch

    import lorac

    folder = Path(given.folder)
    if (folder / "plain.pt2").exists():
        return
    model = common.llama(given)
    methods = {name: lorac.LoRA(r=given.rank, alpha=given.rank) for name in ("a", "b")}
    eager = lorac.compile(model, methods, active=None)
    for seed, adapter in enumerate(eager.adapters.values()):
        common.away_from_init(adapter, seed=seed)
    lorac.compile(model, dict(eager.adapters), target="aoti", active=None, self_test=False).save(folder / "live")
    plain = lorac.compile(model, {}).export_program()
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(plain, package_path=str(folder / "plain.pt2"))


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds per call of all sides, in one process: shape -> side -> seconds; and the median swap."""
    import torch

    import lorac

    compiled = {name: lorac.load(Path(given.folder, "live"), trust=True) for name in SIDES}
    compiled["live"].swap("a")
    packages: dict[str, Any] = {
        name: torch._inductor.aoti_load_package(str(Path(given.folder, "plain.pt2"))) for name in (PLAIN, AGAIN)
    }
    found: dict[str, dict[str, float]] = {}
    for shape in SHAPES:
        inputs = common.tokens(given, shape)
        sides = {name: common.call(model, inputs) for name, model in compiled.items()}
        sides |= {name: common.torch_call(package, inputs) for name, package in packages.items()}
        found[common.label(shape)] = common.alternate(sides, given.rounds)
    seconds = []
    for name in ("b", "a") * given.rounds:
        start = time.perf_counter()
        compiled["live"].swap(name)
        seconds.append(time.perf_counter() - start)
    found[SWAP] = {SWAP: statistics.median(seconds)}
    return found


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Ratios to the plain package, per shape, their median last; then the swap."""
    (by_shape,) = found.values()
    swap = by_shape[SWAP][SWAP]
    shapes = {shape: sides for shape, sides in by_shape.items() if shape != SWAP}
    rows: list[tuple[str, ...]] = []
    for name in (*SIDES, AGAIN):
        ratios = [sides[name] / sides[PLAIN] for sides in shapes.values()]
        milliseconds = " ".join(f"{sides[name] * 1e3:.1f}" for sides in shapes.values())
        rows.append(
            (f"{name} / plain", milliseconds, *(f"{r:.3f}" for r in ratios), f"{statistics.median(ratios):.3f}")
        )
    rows.append((SWAP, f"{swap * 1e3:.2f}", *("" for _ in SHAPES), ""))
    columns = ("side / base", "ms", *map(common.label, SHAPES), "median ratio")
    a_a = {shape: sides[AGAIN] / sides[PLAIN] for shape, sides in shapes.items()}
    return [common.Table("per call, AOTInductor", columns, rows, promised(given), a_a)]


def promised(given: argparse.Namespace) -> Sequence[tuple[str]]:
    """Return the first cells of the table."""
    return [*((f"{name} / plain",) for name in (*SIDES, AGAIN)), (SWAP,)]


BENCHMARK = common.Benchmark(
    name="aoti",
    text=__doc__,
    options=(common.MODEL, common.layers(8), common.RANK, common.rounds(15)),
    jobs=lambda given: [("calls",)],
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
