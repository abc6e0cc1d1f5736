"""How many hands an operation passes through: Python calls, functions and files of lorac, and changes of file.

    python -m benchmarks.hops [--processes 1]

A Llama of two layers with two LoRAs is compiled, called and swapped under ``sys.setprofile``; every operation has run
once before it is counted. The counts are the same on every machine. The cold swap reads a LoRA of 64 tensors from disk
(8 layers of width 512, r = 16 on all four projections of attention), the first and the fifth of one layout, and the
fifth again once it was evicted. Its calls are those of ``cProfile``, built-in functions included; its processor time
is taken without a profiler, the median of ``--rounds``.

Targets: compile for ONNX Runtime <= 90 000 calls in <= 120 files, one of its calls <= 60 calls in <= 10 files, a cold
swap <= 6 000 calls and <= 4 ms.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import itertools
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import common

OPERATIONS = (
    "compile, eager",
    "compile, ONNX Runtime",
    "call, eager",
    "call, ONNX Runtime",
    "call, ONNX Runtime, one choice per row",
    "swap, kept",
    "swap, a new mixture",
    "load_adapter, a PEFT folder",
)
FIRST, FIFTH, AGAIN = COLD = ("the first of its layout", "the fifth of its layout", "evicted before")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
_ROOM = 6
"""Adapters that stay in memory while others are read."""
OPTIONS = (common.rounds(20),)


def prepare(given: argparse.Namespace) -> None:
    """Write the adapters of the cold swap: folders of PEFT's."""
    import torch

    import lorac

    folder, model = Path(given.folder), _llama(8, 512)
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=16, targets=PROJECTIONS)})
    generator = torch.Generator().manual_seed(0)
    for index in range(2 * given.rounds + 2 * _ROOM):
        with torch.no_grad():
            for tensor in compiled.adapters["a"].parameters():
                tensor.normal_(0, 0.02, generator=generator)
        path = folder / "adapters" / f"a{index:03}"
        lorac.save_adapter(compiled.adapters["a"], path, format="peft", model=model)


def _llama(layers: int, width: int) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=width,
        intermediate_size=width * 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
    )
    return transformers.LlamaForCausalLM(config).eval()


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, Any]:
    """Count every operation, or take the time of cold swaps."""
    if job == ("cold swap",):
        return _measure_cold_swaps(given)
    with _operations(Path(given.folder)) as operations:
        return {name: _count(operations[name]) for name in OPERATIONS}


@contextlib.contextmanager
def _operations(folder: Path) -> Iterator[Mapping[str, Callable[[], object]]]:
    """Yield every operation, each of which has run once."""
    import torch

    import lorac

    model = _llama(2, 64)
    adapters = {"a": lorac.LoRA(r=4, targets=["q_proj", "v_proj"]), "b": lorac.LoRA(r=2, targets=["q_proj"])}
    eager = lorac.compile(model, adapters, active=None)
    emitted = lorac.compile(model, adapters, target="onnxruntime", active=None)
    ids = torch.arange(4).reshape(1, 4)
    rows = torch.arange(8).reshape(2, 4)
    strengths = iter(range(1, 100))
    lorac.save_adapter(emitted.adapters["a"], folder / "one", format="peft", model=model)
    steps: dict[str, Callable[[], object]] = {
        "compile, eager": lambda: lorac.compile(model, adapters, active=None),
        "compile, ONNX Runtime": lambda: lorac.compile(model, adapters, target="onnxruntime", active=None),
        "call, eager": lambda: eager(input_ids=ids),
        "call, ONNX Runtime": lambda: emitted(input_ids=ids),
        "call, ONNX Runtime, one choice per row": lambda: emitted(input_ids=rows, adapters=["a", None]),
        "swap, kept": lambda: emitted.swap("b" if dict(emitted.active).get("a") else "a"),
        "swap, a new mixture": lambda: emitted.swap({"a": 0.3, "b": next(strengths) / 100}),
        "load_adapter, a PEFT folder": lambda: lorac.load_adapter(folder / "one", model),
    }
    with torch.no_grad():
        for compiled in (eager, emitted):
            compiled.swap("b")
            compiled.swap("a")
        for step in steps.values():
            step()
        emitted.swap("a")
        yield steps


def _count(operation: Callable[[], object]) -> dict[str, int]:
    """Count the calls of lorac's functions while an operation runs."""
    root = str(Path(sys.modules["lorac"].__file__ or "").parent)
    trip: list[tuple[str, str, int]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(root):
            trip.append((code.co_filename, code.co_qualname, code.co_firstlineno))

    sys.setprofile(note)
    try:
        operation()
    finally:
        sys.setprofile(None)
    files = [file for file, *_ in trip]
    return {
        "calls": len(trip),
        "functions": len(set(trip)),
        "files": len(set(files)),
        "hops": sum(one != other for one, other in itertools.pairwise(files)),
    }


def _measure_cold_swaps(given: argparse.Namespace) -> dict[str, Any]:
    """Count the calls of cold swaps, and take their processor time: each reads an adapter that is not in memory."""
    import lorac

    reserve = lorac.Reserve(targets=PROJECTIONS, rank=16)
    compiled = lorac.compile(_llama(8, 512), reserve=reserve, target="onnxruntime", self_test=False)
    names = sorted(compiled.register(Path(given.folder) / "adapters"))
    one = 8 * len(PROJECTIONS) * 2 * 512 * 16 * 4
    compiled.memory.limit = compiled.memory.used + _ROOM * one
    found: dict[str, Any] = {FIRST: {"calls": _count_all(lambda: compiled.swap(names[0]))}}
    for name in names[1:4]:
        compiled.swap(name)
    found[FIFTH] = {"calls": _count_all(lambda: compiled.swap(names[4]))}
    found[FIFTH] |= _milliseconds(compiled, names[5 : 5 + 2 * given.rounds])
    for name in names * 2:  # a slot image is written when an adapter is evicted for the second time
        compiled.swap(name)
    found[AGAIN] = {"calls": _count_all(lambda: compiled.swap(names[0]))}
    found[AGAIN] |= _milliseconds(compiled, names[1 : 1 + 2 * given.rounds])
    return found


def _count_all(operation: Callable[[], object]) -> int:
    profile = cProfile.Profile()
    profile.runcall(operation)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]  # the stubs of pstats lack it


def _milliseconds(compiled: Any, names: Sequence[str]) -> dict[str, float]:
    """Take the median processor time of swaps to every other adapter, and to the rest."""
    spent = []
    for name in names:
        begun = time.process_time()
        compiled.swap(name)
        spent.append((time.process_time() - begun) * 1e3)
    return {"ms": statistics.median(spent[::2]), "ms, A/A": statistics.median(spent[1::2])}


def tables(found: common.Found, given: argparse.Namespace) -> list[common.Table]:
    """Return the counts of every operation, and those of cold swaps."""
    counts, swaps = found["operations",], found["cold swap",]
    columns = ("calls", "functions", "files", "hops")
    return [
        common.Table(
            "Calls inside lorac",
            ("operation", *columns),
            [(name, *(f"{counts[name][column]:,.0f}" for column in columns)) for name in OPERATIONS],
            [(name,) for name in OPERATIONS],
            {},
        ),
        common.Table(
            "A swap to an adapter on disk, 64 tensors",
            ("adapter", "calls, built-in ones included", "CPU ms"),
            [
                (name, f"{swaps[name]['calls']:,.0f}", f"{swaps[name]['ms']:.2f}" if "ms" in swaps[name] else "")
                for name in COLD
            ],
            [(name,) for name in COLD],
            {name: swaps[name]["ms, A/A"] / swaps[name]["ms"] for name in (FIFTH, AGAIN)},
        ),
    ]


BENCHMARK = common.Benchmark(
    "hops",
    __doc__,
    OPTIONS,
    lambda given: [("operations",), ("cold swap",)],
    measure,
    tables,
    prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
