"""How fast text is written beside onnxruntime-genai and Hugging Face + PEFT: SmolLM2, LoRA on all linear layers.

    python -m benchmarks.generate [--threads 2] [--tokens 32] [--rounds 5] [--processes 3] [--cpu] [--genai FOLDER]
                                  [--only SIDE ...] [--shapes SHAPE ...] [--folder FOLDER]

All sides run in one process and take turns; they read the same prompts, and the greedy tokens of every float side are
held against Hugging Face's, up to the first at which the two best logits there are too close to tell. ``--cpu`` counts
processor time on one thread, which a busy machine disturbs less. Targets stand beside the ratios that they are for:
with the op of lorac-native (where it is installed) live >= 0.97 of its own base and >= 1.05 of genai's with the
adapter, int4 live >= 0.93 of its own base and >= 0.96 with factors in float16; the base >= 1.0 of genai's, live >= 5 of
PEFT's; prefill >= 0.95 of genai's; int4 live >= 2.3 of float live, its base >= 0.95 of genai's; a capacity of 2048
costs <= 1.03 of one of 128. In OpenVINO live with bf16 products >= 2.0 of float live in ONNX Runtime for a prompt of
128 tokens, and >= 1.3 for a single one, where the processor has matrix units for bf16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _genai, common
from benchmarks._writers import Side, Text, through_engine, through_genai, through_generate
from lorac.native_library import find_native_library

GENAI, GENAI_ADAPTER, GENAI_INT4 = "genai base", "genai adapter", "genai int4 base"
BASE, AGAIN, LIVE, ROOMY, USERS = "base", "base, A/A", "live", "live, capacity 2048", "live, generate"
FUSED, SETTLED = "fused", "fused, settled"
INT4_BASE, INT4_LIVE, PEFT = "int4 base", "int4 live", "PEFT"
NATIVE, NATIVE_HALF = "live, native", "live, native, float16"
INT4_NATIVE, INT4_HALF = "int4 live, native", "int4 live, native, float16"
OV_BASE, OV_LIVE, OV_BF16 = "openvino base", "openvino live", "openvino live, bf16"
LORAC = {
    BASE: {},
    LIVE: {"mode": "live"},
    FUSED: {"mode": "fused"},
    INT4_BASE: {"weights": "int4"},
    INT4_LIVE: {"weights": "int4", "mode": "live"},
    OV_BASE: {"target": "openvino"},
    OV_LIVE: {"target": "openvino", "mode": "live"},
}
"""Artifact -> options of its compilation; those with a mode have the adapter."""
LOADED = {BASE: BASE, AGAIN: BASE, LIVE: LIVE, ROOMY: LIVE, USERS: LIVE, FUSED: FUSED, SETTLED: FUSED}
LOADED |= {INT4_BASE: INT4_BASE, INT4_LIVE: INT4_LIVE}
LOADED |= {NATIVE: LIVE, NATIVE_HALF: LIVE, INT4_NATIVE: INT4_LIVE, INT4_HALF: INT4_LIVE}
IN_OPENVINO: Mapping[str, Mapping[str, Any]] = {OV_BASE: {}, OV_LIVE: {}, OV_BF16: {"precision": "bf16"}}
"""Sides in OpenVINO -> options of loading."""
LOADED |= {OV_BASE: OV_BASE, OV_LIVE: OV_LIVE, OV_BF16: OV_LIVE}
WITH_OP = {NATIVE: True, NATIVE_HALF: "float16", INT4_NATIVE: True, INT4_HALF: "float16"}
"""Sides with the op of lorac-native -> ``native=``; all others have ONNX Runtime's own ops."""
BUILT = {GENAI: ("fp32", False), GENAI_ADAPTER: ("fp32", True), GENAI_INT4: ("int4", False)}
SIDES = (GENAI, GENAI_ADAPTER, GENAI_INT4, PEFT, *LOADED)
SMOKE = (GENAI, PEFT, BASE, AGAIN, LIVE, ROOMY, USERS, INT4_LIVE, OV_BF16)
ADAPTED = {GENAI_ADAPTER, PEFT, LIVE, ROOMY, USERS, FUSED, SETTLED, NATIVE, NATIVE_HALF, OV_LIVE, OV_BF16}
ROUGH = {GENAI_INT4, INT4_BASE, INT4_LIVE, INT4_NATIVE, INT4_HALF, OV_BF16}
"""Sides that round their weights or products, and so may well write another text."""
NEAR_TIE = 1e-3
"""Two best logits that are closer than this may change places by rounding."""

DECODING = {"x1": (1, 64), "x8": (8, 64), "x32": (32, 64)}
PREFILL = {"64": (1, 64), "128": (1, 128), "512": (1, 512)}
SHAPES = {**DECODING, "128": PREFILL["128"], "512": PREFILL["512"]}
"""Rows and length of the prompts."""
HELD: Sequence[tuple[str, str, Mapping[str, float]]] = (
    (AGAIN, BASE, {}),
    (BASE, GENAI, {"x1": 1.0, "64": 0.95, "512": 0.95}),
    (LIVE, BASE, {}),
    (NATIVE, BASE, {"x1": 0.97}),
    (NATIVE_HALF, BASE, {"x1": 0.97}),
    (LIVE, GENAI_ADAPTER, {"64": 0.95, "512": 0.95}),
    (NATIVE, GENAI_ADAPTER, {"x1": 1.05, "64": 0.95, "512": 0.95}),
    (LIVE, PEFT, {"x1": 5.0}),
    (FUSED, BASE, {}),
    (SETTLED, BASE, {}),
    (ROOMY, LIVE, {"x1": 1 / 1.03}),
    (USERS, LIVE, {}),
    (INT4_BASE, GENAI_INT4, {"x1": 0.95}),
    (INT4_LIVE, INT4_BASE, {}),
    (INT4_NATIVE, INT4_BASE, {"x1": 0.93}),
    (INT4_HALF, INT4_BASE, {"x1": 0.96}),
    (INT4_LIVE, LIVE, {"x1": 2.3}),
    (OV_BASE, BASE, {}),
    (OV_LIVE, OV_BASE, {}),
    (OV_LIVE, LIVE, {}),
    (OV_BF16, LIVE, {"x1": 1.3, "128": 2.0}),
)
"""Whose speed is held against whose, and how large the ratio is to be."""
LIVES = {AGAIN: BASE, LIVE: BASE, NATIVE: BASE, NATIVE_HALF: BASE}
LIVES |= {INT4_LIVE: INT4_BASE, INT4_NATIVE: INT4_BASE, INT4_HALF: INT4_BASE}
"""Sides whose adapter is next to the weights -> their base."""


# ── What is prepared ─────────────────────────────────────────────────────────────────────────────────────────────────
def prepare(given: argparse.Namespace) -> None:
    """Write the model, the adapter, what engines make of them, and what Hugging Face writes, where it is not there."""
    folder = _folder(given)
    if not (folder / "adapter").exists():
        common.save_host(common.host(given), folder / "model", given)
        common.save_peft(folder / "adapter", given)
    for name in _those(given, BUILT) if _genai.found(given) else ():
        precision, adapted = BUILT[name]
        if not (folder / name).exists():
            _genai.build(folder / "model", folder / name, precision, folder / "adapter" if adapted else None)
    for name in {LOADED[side] for side in measured(given) if side in LOADED}:
        if not (folder / name).exists():
            _compile(LORAC[name], folder, given).save(folder / name)
    if not _reference_file(given).exists():
        _reference_file(given).write_text(json.dumps(_reference(folder, given)))


def _folder(given: argparse.Namespace) -> Path:
    """Where all that is kept: artifacts know how many threads they run on."""
    return Path(given.folder, f"{given.model}-{given.layers}-{given.rank}-{given.threads}")


def _reference_file(given: argparse.Namespace) -> Path:
    return _folder(given) / f"reference-{given.tokens}.json"


def _those(given: argparse.Namespace, sides: Mapping[str, Any]) -> list[str]:
    return [side for side in given.only if side in sides]


def _compile(options: Mapping[str, Any], folder: Path, given: argparse.Namespace) -> Any:
    import lorac

    model = _endless(common.saved_host(folder / "model"))
    adapters = {"a": folder / "adapter"} if "mode" in options else {}
    more: dict[str, Any] = {"target": "onnxruntime", "cache": True, "threads": given.threads, "self_test": False}
    return lorac.compile(model, adapters, **{**more, **options})


def _endless(model: Any) -> Any:
    """Return the model without an end token."""
    model.generation_config.eos_token_id = None
    return model


def _reference(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Hugging Face's tokens with the adapter and without, and how far its two best logits are apart: per shape."""
    import torch

    model = _peft(folder)
    found = {}
    for label, shape in SHAPES.items():
        ids = torch.from_numpy(_prompt(given, shape))
        with torch.no_grad():
            adapted = _told(model, ids, _count(given, label))
            with model.disable_adapter():
                plain = _told(model, ids, _count(given, label))
        found[label] = {"adapted": adapted, "plain": plain}
    return found


def _told(model: Any, ids: Any, count: int) -> dict[str, Any]:
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    answer = model.generate(
        input_ids=ids, attention_mask=ids.new_ones(ids.shape), max_new_tokens=count, pad_token_id=0, **options
    )
    best = [logits.topk(2).values for logits in answer.logits]
    gaps = [(top[:, 0] - top[:, 1]).tolist() for top in best]
    return {"tokens": answer.sequences[:, ids.shape[1] :].T.tolist(), "gaps": gaps}


def _prompt(given: argparse.Namespace, shape: tuple[int, int]) -> Any:
    """Python's manual for SmolLM2; random ids for a host that knows no language."""
    if given.model != common.SMOLLM2:
        return common.tokens(given, shape)["input_ids"]
    from pydoc_data.topics import topics

    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_folder(given) / "model")
    text = "\n".join(topics[name] for name in ("assignment", "class", "compound", "objects"))
    ids = tokenizer(text, verbose=False)["input_ids"]
    return np.array(ids[: math.prod(shape)]).reshape(shape)


def _count(given: argparse.Namespace, label: str) -> int:
    """How many tokens are written after a prompt of this shape."""
    return {"x1": given.tokens, "128": 1, "512": 1}.get(label, max(given.tokens // 2, 2))


def _capacity(side: str, label: str, given: argparse.Namespace) -> int:
    needed = SHAPES[label][1] + _count(given, label)
    return 2048 if side == ROOMY else max(128, needed)


# ── The sides ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _peft(folder: Path) -> Any:
    """Hugging Face's model with PEFT's adapter beside its weights."""
    import peft

    model = _endless(common.saved_host(folder / "model"))
    return peft.PeftModel.from_pretrained(model, str(folder / "adapter")).eval()


def _side(name: str, given: argparse.Namespace) -> Side:
    folder = _folder(given)
    if name in BUILT:
        return through_genai(_genai.load(folder / name, given.threads), given)
    if name == PEFT:
        return through_generate(_peft(folder).generate, given)
    import lorac

    options = IN_OPENVINO.get(name, {"native": WITH_OP.get(name, False)})
    compiled = lorac.load(folder / LOADED[name], **options)
    if name == SETTLED:
        compiled.swap(compiled.active, settle=True)
    return through_generate(compiled.generate, given) if name == USERS else through_engine(compiled, given)


def measured(given: argparse.Namespace) -> list[str]:
    """Return the sides that are asked for and here."""
    missing = {*(() if _genai.found(given) else BUILT), *(() if find_native_library() else WITH_OP)}
    missing |= set() if importlib.util.find_spec("openvino") else {*IN_OPENVINO}
    return [side for side in given.only if side not in missing]


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────
def measure(job: common.Job, given: argparse.Namespace) -> dict[str, Any]:
    """All sides in one process: side -> what -> seconds, nodes, and how many tokens were Hugging Face's."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        sides = {name: _side(name, given) for name in measured(given)}
        found: dict[str, dict[str, Any]] = {name: {"nodes": _nodes(name, given), "same": 0} for name in sides}
        for name in {*found} & {*LOADED}:
            found[name] |= _bytes_read(name, given)
        reference = json.loads(_reference_file(given).read_text())
        for label in given.shapes:
            _measure_shape(label, sides, reference[label], found, given)
    finally:
        torch.set_num_threads(threads)  # a smoke run is not alone in its process
    return found


def _measure_shape(
    label: str,
    sides: Mapping[str, Side],
    reference: Mapping[str, Any],
    found: dict[str, dict[str, Any]],
    given: argparse.Namespace,
) -> None:
    """Medians over rounds, order shuffled in each; a round before them is for the tokens alone."""
    ids, count = _prompt(given, SHAPES[label]), _count(given, label)
    names = [name for name in sides if name != ROOMY or label == "x1"]
    texts: dict[str, list[Text]] = {name: [] for name in names}
    for turn in range(1 + given.rounds):
        for name in random.sample(names, len(names)):
            text = sides[name](ids, count, _capacity(name, label, given))
            if turn:
                texts[name].append(text)
            else:
                found[name]["same"] += _same(name, label, text, reference["adapted" if name in ADAPTED else "plain"])
    for name in names:
        rows = 1 if label in PREFILL else SHAPES[label][0]
        first = statistics.median(text.first for text in texts[name])
        each = statistics.median(text.each for text in texts[name])
        known = {"x1": {label: each / rows, "64": first}, "128": {label: first}, "512": {label: first}}
        found[name] |= known.get(label, {label: each / rows})


def _same(name: str, label: str, text: Text, reference: Mapping[str, Any]) -> int:
    """How many tokens are the reference's, row by row up to the first that is another.

    A float side's may be another only where the reference's two best logits nearly tie.
    """
    same = 0
    steps = list(zip(text.tokens, reference["tokens"], reference["gaps"], strict=True))
    for row in range(len(text.tokens[0])):
        for step, (tokens, wanted, gaps) in enumerate(steps):
            if tokens[row] != wanted[row]:
                where = f"{name}, {label}, row {row}, token {step}"
                tie = name in ROUGH or gaps[row] < NEAR_TIE
                assert tie, f"{where}: {tokens[row]} is not {wanted[row]}, the best by {gaps[row]:.1e}"
                break
            same += 1
    return same


def _nodes(name: str, given: argparse.Namespace) -> int:
    """Nodes of the graph, as it lies in its file; 0 where there is none."""
    import onnx_ir

    file = _folder(given) / LOADED.get(name, name) / "model.onnx"
    return sum(1 for _ in onnx_ir.load(file).graph.all_nodes()) if file.exists() else 0


def _bytes_read(name: str, given: argparse.Namespace) -> dict[str, int]:
    """Bytes of weights, and of the adapter's factors, that a step for one row reads, as it lies in its files."""
    import onnx_ir
    from safetensors import safe_open

    graph = onnx_ir.load(_folder(given) / LOADED[name] / "model.onnx").graph
    nodes = list(graph.all_nodes())
    upright = {node.outputs[0].name: node.inputs[0].name for node in nodes if node.op_type == "Transpose"}
    products = [node for node in nodes if node.op_type in {"MatMul", "Gemm", "MatMulNBits"}]
    read = {upright.get(value.name, value.name) for node in products for value in node.inputs if value is not None}
    slots = {value.name for value in graph.inputs}
    base = sum(graph.initializers[one].const_value.nbytes for one in (read & graph.initializers.keys()) - slots)
    adapter = 0
    if name in {*ADAPTED, INT4_LIVE, INT4_NATIVE, INT4_HALF} and LOADED[name] != FUSED:
        with safe_open(_folder(given) / "adapter" / "adapter_model.safetensors", "np") as file:
            adapter = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118  (it is no mapping)
    return {"base bytes": base, "adapter bytes": adapter // (2 if WITH_OP.get(name) == "float16" else 1)}


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Return the tables of times, and of speed compared with others."""
    (sides,) = found.values()
    per = "CPU-second" if given.cpu else "second"
    written = sum(_count(given, label) * SHAPES[label][0] for label in given.shapes)
    columns = ("side", "nodes", f"tokens equal of {written}", *(f"tok/s {label}" for label in DECODING))
    columns += tuple(f"ms to first, {label}" for label in PREFILL)
    rows = [(name, *_cells(sides.get(name, {}))) for name in given.only]
    title = f"{given.model}, LoRA of rank {given.rank}, {given.threads} threads; tokens per {per} by rows"
    ratios = [(f"{side} / {other}", *_ratios(side, other, bounds, sides)) for side, other, bounds in _held(given)]
    speeds = [(f"{side} / {other}",) for side, other, _ in _held(given)]
    base, second = sides.get(BASE, {}), sides.get(AGAIN, {})
    again = {what: base[what] / second[what] for what in (*DECODING, *PREFILL) if what in base and what in second}
    notes = [_genai.note(given), common.native_note()]
    held = {side: other for side, other, _ in _held(given) if side in LIVES and LIVES[side] == other}
    return [
        common.Table(title, columns, rows, [(name,) for name in given.only], {}, notes),
        common.Table("speed beside another's", ("speed", *DECODING, *PREFILL), ratios, speeds, again),
        common.Table(
            "bytes that a step for one row reads, and the speed beside the base's that they allow",
            ("side", "weights MB", "adapter MB", "GB/s of both", "allowed", "measured"),
            [(side, *_traffic(sides.get(side, {}), sides.get(other, {}))) for side, other in held.items()],
            [(side,) for side in held],
            {},
            ["allowed: where a step takes as long as reading takes, and the factors are read as fast as the weights"],
        ),
    ]


def _traffic(side: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a row of the table of bytes, from the figures of a side and of its base."""
    if "x1" not in side or "x1" not in base:
        return ("-",) * 5
    weights, adapter = side["base bytes"], side["adapter bytes"]
    speed, allowed = (weights + adapter) / side["x1"], weights / (weights + adapter)
    cells = (f"{weights / 1e6:.1f}", f"{adapter / 1e6:.1f}", f"{speed / 1e9:.1f}", f"{allowed:.3f}")
    return (*cells, f"{base['x1'] / side['x1']:.3f}")


def _held(given: argparse.Namespace) -> list[tuple[str, str, Mapping[str, float]]]:
    return [held for held in HELD if {held[0], held[1]} <= {*given.only}]


def _cells(told: Mapping[str, Any]) -> tuple[str, ...]:
    nodes = f"{told['nodes']:.0f}" if told.get("nodes") else "-"
    same = f"{told['same']:.0f}" if "same" in told else "-"
    speeds = (f"{1 / told[what]:.1f}" if what in told else "-" for what in DECODING)
    return nodes, same, *speeds, *(f"{told[what] * 1e3:.1f}" if what in told else "-" for what in PREFILL)


def _ratios(side: str, other: str, bounds: Mapping[str, float], sides: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_ratio(sides.get(side, {}), sides.get(other, {}), what, bounds) for what in (*DECODING, *PREFILL))


def _ratio(side: Mapping[str, float], other: Mapping[str, float], what: str, bounds: Mapping[str, float]) -> str:
    """How many times as fast, beside its target, where it has one."""
    if what not in side or what not in other:
        return "-"
    ratio = other[what] / side[what]
    if what not in bounds:
        return f"{ratio:.3f}"
    return f"{ratio:.3f} ({'missed: ' if ratio < bounds[what] else ''}>= {bounds[what]:.2f})"


BENCHMARK = common.Benchmark(
    name="generate",
    text=__doc__,
    options=(
        common.TEXT_MODEL,
        common.layers(30),
        common.RANK,
        common.rounds(5),
        common.Option("tokens", 32, smoke=4, help="written at batch 1; half of it at others"),
        common.Option("threads", 2, smoke=1, help="of every side"),
        common.Option("cpu", False, smoke=False, help="count processor time; meant for --threads 1"),
        common.Option("only", SIDES, smoke=SMOKE, help="these sides"),
        common.Option(
            "shapes", tuple(SHAPES), smoke=tuple(SHAPES), help="these prompts: of 64 tokens by rows, and of 128 and 512"
        ),
        _genai.OPTION,
    ),
    jobs=lambda given: [("text",)],
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
