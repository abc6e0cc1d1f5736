"""What every method costs on all linear layers of a small Llama: one row each, at its default hyper-parameters.

    python -m benchmarks.variants [--layers 2] [--rounds 25] [--only NAME ...]

Latency is of 1 x 16 tokens through the layers alone (the output layer, which no method adapts here, would hide what
they cost), over the same side's base in the same process; PEFT's is that of the adapter as lorac writes it for PEFT,
over PEFT's base. ONNX Runtime's base is two sessions of it, and A/A how far they are apart. Targets: no live form costs
more than a bound weight (SHiRA's row); what reduces to low-rank stays <= 1.09 at ranks up to 32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import common

SHAPE = (1, 16)
COLUMNS = (
    "method",
    "form",
    "rank",
    "trained",
    "file MiB",
    "swap ms",
    "eager live",
    "eager fused",
    "PEFT",
    "ORT A/A",
    "ORT fused",
    "ORT live",
)


def worker(name: str, layers: int, rounds: int) -> dict[str, Any]:
    """One method in a process of its own."""
    import lorac
    from lorac.errors import LoracError

    model, variant = _layers(layers), lorac.variants()[name]()
    eager = {"eager base": lorac.compile(model, {}), "eager live": lorac.compile(model, {"a": variant})}
    adapter = eager["eager live"].adapters["a"]
    common.away_from_init(adapter, seed=1)
    emitted = {side: lorac.compile(model, {}, target="onnxruntime") for side in ("ORT base", "ORT A/A")}
    emitted["ORT live"] = lorac.compile(model, {"a": adapter}, target="onnxruntime")
    try:
        eager["eager fused"] = lorac.compile(model, {"a": adapter}, mode="fused")
        emitted["ORT fused"] = lorac.compile(model, {"a": adapter}, target="onnxruntime", mode="fused")
    except LoracError as error:
        print(f"{name} is not fused: {error.what}")
    with tempfile.TemporaryDirectory() as folder:
        lorac.save_adapter(adapter, Path(folder, "a.safetensors"), format="native", model=model)
        size = Path(folder, "a.safetensors").stat().st_size
        peft = _peft(adapter, Path(folder, "peft"), layers, model)
    found = common.alternate(_sides({**eager, **peft}, emitted), rounds)
    found["ORT base"] = (found["ORT A/A"] + found["ORT base"]) / 2
    values = [*eager["eager live"].pool["a"].changes.values()]
    return {
        "seconds": found,
        "form": type(values[0]).__name__ if values else "branch",
        "rank": max((getattr(value, "rank", 0) for value in values), default=0),
        "trained": sum(t.numel() for t in adapter.parameters() if t.requires_grad),
        "size": size,
        "swap": _swap(emitted["ORT live"], rounds),
    }


def _peft(adapter: Any, folder: Path, layers: int, model: Any) -> dict[str, Any]:
    """PEFT's model of the same adapter, where PEFT has its type."""
    from peft import PeftModel

    import lorac
    from lorac.errors import UnsupportedField

    try:
        lorac.save_adapter(adapter, folder, format="peft", model=model)
    except UnsupportedField:
        return {}
    return {
        "PEFT base": _layers(layers),
        "PEFT": PeftModel.from_pretrained(_layers(layers), str(folder)).eval(),
    }


def _layers(count: int) -> Any:
    """Embedding and layers of the benchmarks' Llama."""
    return common.llama_170m(count).model


def _sides(hosts: dict[str, Any], emitted: dict[str, Any]) -> dict[str, common.Side]:
    import torch

    ids = torch.ones(SHAPE, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def side(model: Any) -> common.Side:
        def call() -> Any:
            with torch.no_grad():
                return model(**inputs)

        return call

    return {name: side(model) for name, model in {**hosts, **emitted}.items()}


def _swap(compiled: Any, rounds: int) -> float:
    """Seconds of the median swap to the adapter, when it is resident."""
    times = []
    for _ in range(rounds):
        compiled.swap(None)
        begun = time.perf_counter()
        compiled.swap("a")
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One method's row."""
    seconds = found["seconds"]

    def ratio(side: str) -> str:
        base = f"{side.partition(' ')[0]} base"
        return f"{seconds[side] / seconds[base]:.2f}" if side in seconds else "-"

    return (
        name,
        found["form"],
        str(found["rank"]),
        f"{found['trained']:,}",
        f"{found['size'] / 2**20:.2f}",
        f"{found['swap'] * 1e3:.2f}",
        *(ratio(side) for side in COLUMNS[6:]),
    )


def _with_defaults(known: Mapping[str, Any]) -> list[str]:
    """Names of the methods that need no configuration."""
    return [n for n, v in known.items() if all(f.default is not f.default_factory for f in dataclasses.fields(v))]


def main() -> None:
    """One fresh process per method; rows as they are measured, then the table."""
    import lorac

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(worker(given.worker, given.layers, given.rounds)))
        return
    rows = []
    for name in given.only or _with_defaults(lorac.variants()):
        arguments = ("--worker", name, "--layers", str(given.layers), "--rounds", str(given.rounds))
        rows.append(row(name, common.in_fresh_process("benchmarks.variants", *arguments)))
        print("  ".join(rows[-1]), flush=True)
    common.print_table(f"every method, Llama of {given.layers} layers, 1 x 16 tokens", COLUMNS, rows)


if __name__ == "__main__":
    main()
