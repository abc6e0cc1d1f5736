"""What a swap costs: adapters resident; swap plus the next call, minus a steady call.

    python -m benchmarks.swap [--layers 20] [--rank 16] [--rounds 15]

Targets: sparse switch at 1 % (restore A's, write B's) <= 1.3 of the same two bare scatters and >= 8x faster than
PEFT's unmerge + merge of LoRA; live swap <= 2 ms; exact fused LoRA switch <= 1.3 of ``torch.addmm(out=)`` over the
same weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks import common


def main() -> None:
    """Measure every kind of swap in one process, alternating, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    model = common.llama_170m(given.layers)
    lora, sparse = _adapters(model, given.rank)
    sides = {
        "live LoRA (ONNX Runtime)": _swapper(_compiled(model, lora, "onnxruntime", "live")),
        "fused LoRA (ONNX Runtime)": _swapper(_compiled(model, lora, "onnxruntime", "fused")),
        "fused LoRA (eager)": _swapper(_compiled(model, lora, "eager", "fused")),
        "fused SHiRA 1 % (eager)": _swapper(_compiled(model, sparse, "eager", "fused")),
        "fused SHiRA 1 % (ONNX Runtime)": _swapper(_compiled(model, sparse, "onnxruntime", "fused")),
        "bare addmm(out=)": _bare_addmm(model, lora["a"]),
        "bare two scatters": _bare_scatters(model, sparse),
        "PEFT unmerge + merge": _peft(model, given.rank),
    }
    seconds = common.alternate(sides, given.rounds)
    report(seconds)
    _report_following_calls(model, lora, given.rounds)


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


def _bare_addmm(model: Any, adapter: Any) -> common.Side:
    import torch

    weights = {path: model.get_submodule(path).weight.detach() for path in adapter.sites}
    out = {path: torch.empty_like(weight) for path, weight in weights.items()}

    def run() -> None:
        for path, weight in weights.items():
            tensors = adapter.tensors[path]
            torch.addmm(weight, tensors["lora_B"].detach(), tensors["lora_A"].detach(), out=out[path])

    return run


def _bare_scatters(model: Any, adapters: dict[str, Any]) -> common.Side:
    import torch

    buffers = {path: model.get_submodule(path).weight.detach().clone() for path in adapters["a"].sites}
    moves = []
    for name in ("a", "b"):
        for path, tensors in adapters[name].tensors.items():
            rows, cols = tensors["indices"]
            flat = rows * buffers[path].shape[1] + cols
            moves.append((buffers[path].view(-1), flat, torch.randn(flat.numel())))

    def run() -> None:
        for buffer, positions, values in moves:
            buffer.index_copy_(0, positions, values)

    return run


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


def report(seconds: dict[str, float]) -> None:
    """Each swap beside its floor and beside PEFT's."""
    floors = {
        "fused LoRA (ONNX Runtime)": "bare addmm(out=)",
        "fused LoRA (eager)": "bare addmm(out=)",
        "fused SHiRA 1 % (eager)": "bare two scatters",
        "fused SHiRA 1 % (ONNX Runtime)": "bare two scatters",
    }
    peft = seconds["PEFT unmerge + merge"]
    rows = []
    for name, value in seconds.items():
        floor = f"{value / seconds[floors[name]]:.2f}" if name in floors else ""
        rows.append((name, f"{value * 1e3:.2f}", floor, f"{peft / value:.1f}x"))
    common.print_table("a swap, adapters resident", ("swap", "ms", "ratio to its floor", "faster than PEFT"), rows)


def _report_following_calls(model: Any, adapters: dict[str, Any], rounds: int) -> None:
    """Swap plus the next call, minus a steady call; and a cold ``add_adapter``."""
    import numpy as np

    rows = []
    ids = np.ones((1, 16), dtype=np.int64)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for mode in ("live", "fused"):
        compiled = _compiled(model, adapters, "onnxruntime", mode)
        swap, steady, after, cold = _swapper(compiled), [], [], []
        for _ in range(rounds):
            swap()
            compiled(**inputs)
            steady.append(_timed(lambda compiled=compiled: compiled(**inputs)))
            after.append(_timed(lambda compiled=compiled, swap=swap: (swap(), compiled(**inputs))))
            cold.append(_timed(lambda compiled=compiled: compiled.add_adapter(adapters["a"], name="cold")))
            compiled.remove_adapter("cold")
        extra = statistics.median(after) - statistics.median(steady)
        rows.append((mode, *(f"{v * 1e3:.2f}" for v in (statistics.median(steady), extra, statistics.median(cold)))))
    columns = ("mode", "steady call ms", "swap + next call - steady ms", "cold add_adapter ms")
    common.print_table("ONNX Runtime, 1x16", columns, rows)


def _timed(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
