"""The cost of every method on all linear layers of a small Llama: one row each, at its default hyper-parameters.

    python -m benchmarks.variants [--layers 2] [--rounds 25] [--only NAME ...] [--processes 3]

Latency is of 1 x 16 tokens through the layers alone (the output layer, which no method adapts here, would hide what
they cost), over the same side's base in the same process; PEFT's is that of the adapter as lorac writes it for PEFT,
over PEFT's base. ONNX Runtime's base is two sessions of it, and A/A how far they are apart. Targets: no live form costs
more than a bound weight (SHiRA's row); what reduces to low-rank stays <= 1.09 at ranks up to 32.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Sequence
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


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, Any]:
    """One method in a process of its own."""
    import lorac
    from lorac.errors import LoracError

    (name,) = job
    model, variant = _layers(given), lorac.variants()[name]()
    eager = {"eager base": lorac.compile(model, {}), "eager live": lorac.compile(model, {"a": variant})}
    adapter = eager["eager live"].adapters["a"]
    common.away_from_init(adapter, seed=1)
    emitted = {side: lorac.compile(model, {}, target="onnxruntime") for side in ("ORT base", "ORT A/A")}
    emitted["ORT live"] = lorac.compile(model, {"a": adapter}, target="onnxruntime")
    with contextlib.suppress(LoracError):  # a method that is not fused has no such cells
        eager["eager fused"] = lorac.compile(model, {"a": adapter}, mode="fused")
        emitted["ORT fused"] = lorac.compile(model, {"a": adapter}, target="onnxruntime", mode="fused")
    with tempfile.TemporaryDirectory() as folder:
        lorac.save_adapter(adapter, Path(folder, "a.safetensors"), format="native", model=model)
        size = Path(folder, "a.safetensors").stat().st_size
        peft = _peft(adapter, Path(folder, "peft"), given, model)
    found = common.alternate(_sides({**eager, **peft, **emitted}), given.rounds)
    found["ORT base"] = (found["ORT A/A"] + found["ORT base"]) / 2
    values = [*eager["eager live"].pool["a"].changes.values()]
    return {
        "seconds": found,
        "form": type(values[0]).__name__ if values else "branch",
        "rank": max((getattr(value, "rank", 0) for value in values), default=0),
        "trained": sum(t.numel() for t in adapter.parameters() if t.requires_grad),
        "size": size,
        "swap": _swap(emitted["ORT live"], given.rounds),
    }


def _peft(adapter: Any, folder: Path, given: argparse.Namespace, model: Any) -> dict[str, Any]:
    """PEFT's model of the same adapter, where PEFT has its type."""
    from peft import PeftModel

    import lorac
    from lorac.errors import FormatError

    try:
        lorac.save_adapter(adapter, folder, format="peft", model=model)
    except FormatError as error:
        if error.code != "unsupported_field":
            raise
        return {}
    return {
        "PEFT base": _layers(given),
        "PEFT": PeftModel.from_pretrained(_layers(given), str(folder)).eval(),
    }


def _layers(given: argparse.Namespace) -> Any:
    """Embedding and layers of the benchmarks' Llama."""
    return common.llama(given).model


def _sides(models: dict[str, Any]) -> dict[str, common.Side]:
    import torch

    ids = torch.ones(SHAPE, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def side(model: Any) -> common.Side:
        def call() -> Any:
            with torch.no_grad():
                return model(**inputs)

        return call

    return {name: side(model) for name, model in models.items()}


def _swap(compiled: Any, rounds: int) -> float:
    """Seconds of the median swap to the adapter, when it is resident."""
    times = []
    for _ in range(rounds):
        compiled.swap(None)
        times.append(common.seconds(lambda: compiled.swap("a")))
    return statistics.median(times)


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """One row per method."""
    rows = [_row(name, found[(name,)]) for name in given.only]
    a_a = {name: found[(name,)]["seconds"]["ORT A/A"] / found[(name,)]["seconds"]["ORT base"] for name in given.only}
    title = f"every method, Llama of {given.layers} layers, 1 x 16 tokens"
    return [common.Table(title, COLUMNS, rows, [(name,) for name in given.only], a_a)]


def _row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """One method's row."""
    seconds = found["seconds"]

    def ratio(side: str) -> str:
        base = f"{side.partition(' ')[0]} base"
        return f"{seconds[side] / seconds[base]:.2f}" if side in seconds else "-"

    return (
        name,
        found["form"],
        f"{found['rank']:.0f}",
        f"{found['trained']:,.0f}",
        f"{found['size'] / 2**20:.2f}",
        f"{found['swap'] * 1e3:.2f}",
        *(ratio(side) for side in COLUMNS[6:]),
    )


def methods() -> tuple[str, ...]:
    """Names of the methods that need no configuration."""
    import lorac

    known = lorac.variants().items()
    return tuple(n for n, v in known if all(f.default is not f.default_factory for f in dataclasses.fields(v)))


BENCHMARK = common.Benchmark(
    name="variants",
    text=__doc__,
    options=(
        common.MODEL,
        common.layers(2),
        common.rounds(25),
        common.Option("only", methods(), smoke=("lora",), help="these methods"),
    ),
    jobs=lambda given: [(name,) for name in given.only],
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
)

if __name__ == "__main__":
    BENCHMARK.main()
