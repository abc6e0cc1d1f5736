"""The cost of a swap: adapters resident; swap plus the next call, minus a steady call.

    python -m benchmarks.swap [--layers 20] [--rank 16] [--rounds 15] [--processes 3] [--clock cpu]

Each swap is held against what its memory traffic takes: a sparse one (restore A's values, write B's) against reading
and writing as many bytes as the cache lines it touches have, in one contiguous piece; one of LoRA in fused mode against
copying the weights once. How much slower the same lines are where they lie, one value in each, is a row of its own:
memory that is read in no order is read more slowly, and the processor reads the neighbours of lines too. Targets: SHiRA
at 1 % <= 2.5 of that and >= 5x faster than PEFT's unmerge + merge of LoRA; fused LoRA <= 1.3; live swap <= 2 ms. Writes
into weights are by lorac-native where it is installed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import common

PEFT, COPY, LINES = "PEFT unmerge + merge", "weights copied once", "touched lines, contiguous"
SCATTERED = "touched lines, where they lie"
LINE = 64
"""Bytes of a cache line."""
# A swap -> what it cannot be quicker than; the base of A/A is a second compile of the same.
FLOORS = {
    "live LoRA (ONNX Runtime)": None,
    "fused LoRA (ONNX Runtime)": COPY,
    "fused LoRA (eager)": COPY,
    "A/A: fused LoRA (eager)": "fused LoRA (eager)",
    "fused SHiRA 1 % (eager)": LINES,
    "fused SHiRA 1 % (ONNX Runtime)": LINES,
    COPY: None,
    LINES: None,
    SCATTERED: LINES,
    PEFT: None,
}
MODES = ("live", "fused")


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every kind of swap in one process, alternating; then what follows one: part of the report -> seconds."""
    model = common.llama(given)
    lora, sparse = _adapters(model, given.rank)
    sides = {
        "live LoRA (ONNX Runtime)": _swapper(_compiled(model, lora, "onnxruntime", "live")),
        "fused LoRA (ONNX Runtime)": _swapper(_compiled(model, lora, "onnxruntime", "fused")),
        "fused LoRA (eager)": _swapper(_compiled(model, lora, "eager", "fused")),
        "A/A: fused LoRA (eager)": _swapper(_compiled(model, lora, "eager", "fused")),
        "fused SHiRA 1 % (eager)": _swapper(_compiled(model, sparse, "eager", "fused")),
        "fused SHiRA 1 % (ONNX Runtime)": _swapper(_compiled(model, sparse, "onnxruntime", "fused")),
        COPY: _copy_weights(model, lora["a"]),
        LINES: _negate_lines(model, sparse),
        SCATTERED: _write_lines(model, sparse),
        PEFT: _peft(model, given.rank),
    }
    return {"swaps": common.alternate(sides, given.rounds, clock=common.CLOCKS[given.clock])} | {
        mode: _following_calls(_compiled(model, lora, "onnxruntime", mode), lora, given) for mode in MODES
    }


def _adapters(model: Any, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    import lorac

    found = []
    for variant in (lorac.LoRA(r=rank, alpha=rank), lorac.SHiRA(ratio=0.01)):
        eager = lorac.compile(model, {"a": variant, "b": variant})
        for seed, adapter in enumerate(eager.adapters.values()):
            common.away_from_init(adapter, seed)
        found.append(dict(eager.adapters))
    return found[0], found[1]


def _compiled(model: Any, adapters: dict[str, Any], target: str, mode: str) -> Any:
    import lorac

    return lorac.compile(model, adapters, target=target, mode=mode, active=None)


def _swapper(compiled: Any) -> common.Side:
    """From one adapter to the other."""

    def swap() -> None:
        compiled.swap("b" if "a" in compiled.active else "a")

    return swap


def _copy_weights(model: Any, adapter: Any) -> common.Side:
    import torch

    weights = [model.get_submodule(path).weight.detach() for path in adapter.sites]
    copies = [torch.empty_like(weight) for weight in weights]

    def run() -> None:
        for weight, copied in zip(weights, copies, strict=True):
            copied.copy_(weight)

    return run


def _negate_lines(model: Any, adapters: dict[str, Any]) -> common.Side:
    """In place, memory as large as all lines that restoring one adapter and writing another touches."""
    import torch

    lines = sum(len(found) for _, found in _touched_lines(model, adapters))
    return torch.ones(lines * LINE // torch.float32.itemsize).neg_


def _touched_lines(model: Any, adapters: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each site, and the first positions of the cache lines that an adapter touches there."""
    import torch

    items = LINE // torch.float32.itemsize
    for adapter in adapters.values():
        for path, tensors in adapter.tensors.items():
            rows, cols = tensors["indices"]
            positions = rows * model.get_submodule(path).weight.shape[1] + cols
            yield path, torch.unique(positions // items) * items


def _write_lines(model: Any, adapters: dict[str, Any]) -> common.Side:
    """Write one value into each line that restoring one adapter and writing another touches, as a swap does."""
    import torch

    from lorac.ir.slots.weight_writes import SparseWrites

    weights = {path: model.get_submodule(path).weight.detach().clone() for path in next(iter(adapters.values())).sites}
    writes = SparseWrites()
    for path, positions in _touched_lines(model, adapters):
        writes.add(weights[path], positions, torch.zeros(len(positions)))
    return writes.run


def _peft(model: Any, rank: int) -> common.Side:
    import copy

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(model), config, adapter_name="a").eval()
    adapted.add_adapter("b", config)
    adapted.merge_adapter(["a"])
    merged = ["a"]

    def swap() -> None:
        merged[0] = "b" if merged[0] == "a" else "a"
        adapted.unmerge_adapter()
        adapted.set_adapter(merged[0])
        adapted.merge_adapter([merged[0]])

    return swap


def _following_calls(compiled: Any, adapters: dict[str, Any], given: argparse.Namespace) -> dict[str, float]:
    """Seconds of a steady call, of a swap and the next call beyond that, and of a cold ``add_adapter``."""
    inputs = common.tokens(given, (1, 16))
    swap = _swapper(compiled)
    steady, after, cold = [], [], []
    for _ in range(given.rounds):
        swap()
        compiled(**inputs)
        steady.append(common.seconds(lambda: compiled(**inputs)))
        after.append(common.seconds(lambda: (swap(), compiled(**inputs))))
        cold.append(common.seconds(lambda: compiled.add_adapter(adapters["a"], name="cold")))
        compiled.remove_adapter("cold")
    call = statistics.median(steady)
    return {"steady": call, "extra": statistics.median(after) - call, "cold": statistics.median(cold)}


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Each swap beside its floor and beside PEFT's; then what follows a swap."""
    (parts,) = found.values()
    return [_swaps(parts["swaps"]), _following(parts)]


def _swaps(seconds: dict[str, float]) -> common.Table:
    ratios = {name: seconds[name] / seconds[floor] for name, floor in FLOORS.items() if floor}
    rows = [
        (
            name,
            f"{value * 1e3:.2f}",
            f"{ratios[name]:.2f}" if name in ratios else "",
            f"{seconds[PEFT] / value:.1f}x",
        )
        for name, value in seconds.items()
    ]
    columns = ("swap", "ms", "ratio to its floor", "faster than PEFT")
    a_a = {"fused LoRA (eager)": ratios["A/A: fused LoRA (eager)"]}
    return common.Table(
        "a swap, adapters resident", columns, rows, [(name,) for name in FLOORS], a_a, [common.native_note()]
    )


def _following(parts: dict[str, dict[str, float]]) -> common.Table:
    rows = [(mode, *(f"{parts[mode][what] * 1e3:.2f}" for what in ("steady", "extra", "cold"))) for mode in MODES]
    columns = ("mode", "steady call ms", "swap + next call - steady ms", "cold add_adapter ms")
    return common.Table("ONNX Runtime, 1x16", columns, rows, [(mode,) for mode in MODES], {})


BENCHMARK = common.Benchmark(
    name="swap",
    text=__doc__,
    options=(common.MODEL, common.layers(20), common.RANK, common.rounds(15), common.CLOCK),
    jobs=lambda given: [("swaps",)],
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
)

if __name__ == "__main__":
    BENCHMARK.main()
