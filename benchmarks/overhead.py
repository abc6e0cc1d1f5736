"""The cost of an adapter per call in ONNX Runtime and in PEFT, compared with the same base.

    python -m benchmarks.overhead [--layers 20] [--rank 16] [--rounds 15] [--processes 3] [--no-peft] [--folder FOLDER]

Targets: live LoRA <= 1.06 as the median over shapes and none above 1.09; live DoRA <= 1.10; swapped to none <= 1.03;
baked 1.00; lorac's base <= 1.03 of the plain export, in OpenVINO (where it is installed) <= 1.05. Fused (bound) is
reported as measured; settled 1.00.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

SHAPES = ((1, 1), (1, 16), (1, 128), (8, 1), (8, 32))
ORT = ("base", "live", "dora", "baked", "fused", "A/A", "live, none", "settled")
PEFT_BASE, PLAIN = "PEFT's base", "plain export"
PEFT = {"PEFT LoRA": False, "PEFT DoRA": True}
OV_BASE, OV_PLAIN, OV_AGAIN = "openvino", "openvino's plain export", "openvino A/A"
IN_OPENVINO = (
    {
        "openvino live": OV_BASE,
        "openvino live, bf16": "live",
        OV_BASE: OV_PLAIN,
        OV_AGAIN: OV_BASE,
    }
    if importlib.util.find_spec("openvino")
    else {}
)
"""Side in OpenVINO -> its base."""


def prepare(given: argparse.Namespace) -> None:
    """Compile every side once and save it; processes load them."""
    import lorac

    folder = Path(given.folder)
    if (folder / "plain.onnx").exists():
        return
    model = common.llama(given)
    lorac.compile(model, {}, target="onnxruntime").save(folder / "base")
    for name, variant, mode in (
        ("live", lorac.LoRA(r=given.rank, alpha=given.rank), "live"),
        ("dora", lorac.DoRA(r=given.rank, alpha=given.rank), "live"),
        ("baked", lorac.LoRA(r=given.rank, alpha=given.rank), "baked"),
        ("fused", lorac.LoRA(r=given.rank, alpha=given.rank), "fused"),
    ):
        eager = lorac.compile(model, {"a": variant})
        common.away_from_init(eager.adapters["a"], seed=1)
        lorac.compile(model, {"a": eager.adapters["a"]}, target="onnxruntime", mode=mode).save(folder / name)
        if name == "live" and IN_OPENVINO:
            adapter = {"a": eager.adapters["a"]}
            lorac.compile(model, adapter, target="openvino", threads=0).save(folder / "openvino-live")
    if IN_OPENVINO:
        lorac.compile(model, {}, target="openvino").save(folder / "openvino")
    common.plain_export(model, folder / "plain.onnx")


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds per call of all sides, in one process: shape -> side -> seconds."""
    import lorac

    def load(name: str) -> Any:
        return lorac.load(Path(given.folder, name))

    compiled = {name: load(name) for name in ("base", "live", "dora", "baked", "fused")}
    compiled["A/A"], compiled["live, none"], compiled["settled"] = load("base"), load("live"), load("fused")
    compiled["live, none"].swap(None)
    compiled["settled"].swap("a", settle=True)
    compiled[PLAIN] = _plain(load("base"), Path(given.folder, "plain.onnx"))
    compiled |= _openvino_sides(given) if IN_OPENVINO else {}
    torch_sides = _peft_sides(given) if given.peft else {}
    found = {}
    for shape in SHAPES:
        inputs = common.tokens(given, shape)
        sides = {name: common.call(model, inputs) for name, model in compiled.items()}
        sides |= {name: common.torch_call(model, inputs) for name, model in torch_sides.items()}
        found[common.label(shape)] = common.alternate(sides, given.rounds)
    return found


def _plain(compiled: Any, path: Path) -> Any:
    """Return the plain export behind lorac's call, so that all sides go through the same one."""
    import onnxruntime as ort

    from lorac.backends.onnxruntime.engine import GraphSession, OrtEngine
    from lorac.backends.onnxruntime.inference_session import session_options

    base = compiled.engine
    session = ort.InferenceSession(path, session_options(base.options))
    session.lorac_native_layers, session.lorac_prepacked = 0, False  # which lorac notes of the sessions that it starts
    graphs = {name: GraphSession(session, graph.interface, slots={}) for name, graph in base.graphs.items()}
    engine = OrtEngine(dataclasses.replace(base.program, graphs=graphs, plans={}))
    return type(compiled)(dataclasses.replace(compiled.session, plans={}), engine)


def _openvino_sides(given: argparse.Namespace) -> dict[str, Any]:
    """Return lorac's programs in OpenVINO, and the plain export in OpenVINO behind lorac's call."""
    import openvino

    import lorac
    from lorac.backends.openvino.engine import CompiledGraph, OvEngine

    live, base, again = (lorac.load(Path(given.folder, name)) for name in ("openvino-live", "openvino", "openvino"))
    half = lorac.load(Path(given.folder, "openvino-live"), precision="bf16")
    program = base.engine.program
    model = openvino.Core().compile_model(
        Path(given.folder, "plain.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
    )
    graphs = {name: CompiledGraph(model, {}, g.interface, {}, program.options) for name, g in program.graphs.items()}
    engine = OvEngine(dataclasses.replace(program, graphs=graphs, plans={}))
    plain = type(base)(dataclasses.replace(base.session, plans={}), engine)
    return {"openvino live": live, "openvino live, bf16": half, OV_BASE: base, OV_AGAIN: again, OV_PLAIN: plain}


def _peft_sides(given: argparse.Namespace) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    sides = {PEFT_BASE: common.llama(given)}
    for name, dora in PEFT.items():
        config = LoraConfig(
            r=given.rank, lora_alpha=given.rank, use_dora=dora, target_modules="all-linear", init_lora_weights=False
        )
        sides[name] = get_peft_model(common.llama(given), config).eval()
    return sides


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Ratios to the side's own base, per shape, their median last; live LoRA's also to the plain export."""
    (by_shape,) = found.values()
    pairs = [(name, PLAIN if name == "base" else "base") for name in (*ORT, PLAIN)]
    pairs += [*IN_OPENVINO.items()]
    pairs += [(name, PEFT_BASE) for name in (PEFT_BASE, *PEFT) if given.peft]
    rows, ratios = [], {}
    for name, base in (*pairs, ("live", PLAIN)):
        label = f"{name} / {base}"
        ratios[label] = {shape: sides[name] / sides[base] for shape, sides in by_shape.items()}
        milliseconds = " ".join(f"{sides[name] * 1e3:.1f}" for sides in by_shape.values())
        median = statistics.median(ratios[label].values())
        rows.append((label, milliseconds, *(f"{r:.3f}" for r in ratios[label].values()), f"{median:.3f}"))
    columns = ("side / base", "ms", *map(common.label, SHAPES), "median ratio")
    title = f"per call, ONNX Runtime{', OpenVINO' if IN_OPENVINO else ''} and PEFT"
    return [common.Table(title, columns, rows, promised(given), ratios["A/A / base"])]


def promised(given: argparse.Namespace) -> Sequence[tuple[str]]:
    """Return the first cells of the table."""
    lorac = ("base / plain export", *(f"{name} / base" for name in (*ORT[1:], PLAIN)))
    peft = (f"{name} / {PEFT_BASE}" for name in (PEFT_BASE, *PEFT) if given.peft)
    openvino = (f"{name} / {base}" for name, base in IN_OPENVINO.items())
    return [(label,) for label in (*lorac, *openvino, *peft, "live / plain export")]


BENCHMARK = common.Benchmark(
    name="overhead",
    text=__doc__,
    options=(
        common.MODEL,
        common.layers(20),
        common.RANK,
        common.rounds(15),
        common.Option("peft", True, smoke=True, help="measure PEFT too"),
    ),
    jobs=lambda given: [("calls",)],
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
