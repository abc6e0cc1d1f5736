"""What an adapter costs per call in ONNX Runtime and in PEFT, beside the same base.

    python -m benchmarks.overhead [--layers 20] [--rank 16] [--rounds 15] [--processes 3] [--peft/--no-peft]
        [--folder FOLDER]

Targets: live LoRA <= 1.06 as the median over shapes and none above 1.09; live DoRA <= 1.10; swapped to none <= 1.03;
baked 1.00; lorac's base <= 1.03 of the plain export. Fused (bound) is reported as measured; settled 1.00.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common

SHAPES = ((1, 1), (1, 16), (1, 128), (8, 1), (8, 32))


def build(folder: Path, layers: int, rank: int) -> None:
    """Compile every side once and save it; processes load them."""
    import torch

    import lorac

    model = common.llama_170m(layers)
    lorac.compile(model, {}, target="onnxruntime").save(folder / "base")
    for name, variant, mode in (
        ("live", lorac.LoRA(r=rank, alpha=rank), "live"),
        ("dora", lorac.DoRA(r=rank, alpha=rank), "live"),
        ("baked", lorac.LoRA(r=rank, alpha=rank), "baked"),
        ("fused", lorac.LoRA(r=rank, alpha=rank), "fused"),
    ):
        eager = lorac.compile(model, {"a": variant})
        common.away_from_init(eager.adapters["a"], seed=1)
        lorac.compile(model, {"a": eager.adapters["a"]}, target="onnxruntime", mode=mode).save(folder / name)
    plain_export(model, folder / "plain.onnx", torch)


def plain_export(model: Any, path: Path, torch: Any) -> None:
    """The same model through transformers' own exporter, told the shapes: left to find them it takes longer."""
    import onnx_ir
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    inputs = {"input_ids": torch.ones(2, 7, dtype=torch.int64), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    config = OnnxConfig(dynamic_shapes=dict.fromkeys(inputs, free))
    program = OnnxExporter().export(model, inputs, config).program
    onnx_ir.save(program, path, external_data=f"{path.name}.data")


def worker(folder: Path, layers: int, rank: int, rounds: int, with_peft: bool) -> dict[str, float]:
    """All sides in one process."""
    import numpy as np

    import lorac

    def load(name: str) -> Any:
        return lorac.load(folder / name)

    compiled = {name: load(name) for name in ("base", "live", "dora", "baked", "fused")}
    compiled["A/A"], compiled["live, none"], compiled["settled"] = load("base"), load("live"), load("fused")
    compiled["live, none"].swap(None)
    compiled["settled"].swap("a", settle=True)
    compiled["plain export"] = _plain(load("base"), folder / "plain.onnx")
    torch_sides = _peft_sides(layers, rank) if with_peft else {}
    found = {}
    for shape in SHAPES:
        ids = np.random.default_rng(0).integers(0, 32000, shape)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        sides = {name: _call(model, inputs) for name, model in compiled.items()}
        sides |= {name: _torch_call(model, inputs) for name, model in torch_sides.items()}
        for name, seconds in common.alternate(sides, rounds).items():
            found[f"{name}|{shape[0]}x{shape[1]}"] = seconds
    return found


def _call(model: Any, inputs: Any) -> common.Side:
    return lambda: model(**inputs)


def _torch_call(model: Any, inputs: Any) -> common.Side:
    import torch

    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}

    def call() -> Any:
        with torch.no_grad():
            return model(**tensors)

    return call


def _plain(compiled: Any, path: Path) -> Any:
    """The plain export behind lorac's call, so that all sides go through the same one."""
    from lorac.backends.onnxruntime.engine import OrtEngine
    from lorac.backends.onnxruntime.session import new_session

    base = compiled.engine
    compiled.engine = OrtEngine(
        session=new_session(path, base.options),
        signature=base.signature,
        slots={},
        plans={},
        base=base.base,
        mode=base.mode,
        folder=base.folder,
        options=base.options,
    )
    return compiled


def _peft_sides(layers: int, rank: int) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    sides = {"PEFT's base": common.llama_170m(layers)}
    for name, dora in (("PEFT LoRA", False), ("PEFT DoRA", True)):
        config = LoraConfig(
            r=rank, lora_alpha=rank, use_dora=dora, target_modules="all-linear", init_lora_weights=False
        )
        sides[name] = get_peft_model(common.llama_170m(layers), config).eval()
    return sides


def report(found: dict[str, float]) -> None:
    """Ratios to the side's own base, per shape, their median last; live LoRA's also to the plain export."""
    shapes = [f"{batch}x{length}" for batch, length in SHAPES]
    names = list(dict.fromkeys(key.partition("|")[0] for key in found))
    pairs = [
        (name, "PEFT's base" if name.startswith("PEFT") else "plain export" if name == "base" else "base")
        for name in names
    ]
    rows = []
    for name, base in (*pairs, ("live", "plain export")):
        ratios = [found[f"{name}|{shape}"] / found[f"{base}|{shape}"] for shape in shapes]
        milliseconds = [f"{found[f'{name}|{shape}'] * 1e3:.1f}" for shape in shapes]
        label = f"{name} / {base}"
        rows.append((label, " ".join(milliseconds), *(f"{r:.3f}" for r in ratios), f"{statistics.median(ratios):.3f}"))
    common.print_table("per call, ONNX Runtime and PEFT", ("side / base", "ms", *shapes, "median ratio"), rows)


def main() -> None:
    """Build once, measure in fresh processes, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--peft", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, help="where compiled models are kept, and found by the next run")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(worker(given.worker, given.layers, given.rank, given.rounds, given.peft)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        if not (folder / "plain.onnx").exists():
            build(folder, given.layers, given.rank)
        arguments = ["--worker", str(folder), "--layers", str(given.layers), "--rank", str(given.rank)]
        arguments += ["--rounds", str(given.rounds), "--peft" if given.peft else "--no-peft"]
        runs = [common.in_fresh_process("benchmarks.overhead", *arguments) for _ in range(given.processes)]
    report(common.medians(runs))


if __name__ == "__main__":
    main()
