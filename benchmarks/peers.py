"""Text beside the engines that people would pick instead: llama.cpp, OpenVINO GenAI, onnxruntime-genai, PEFT.

    python -m benchmarks.peers [--threads 2] [--tokens 32] [--rounds 5] [--processes 3] [--weights float32 int4]
                               [--shapes x1 x8 x32 512] [--engines FOLDER] [--genai FOLDER] [--folder FOLDER]

SmolLM2 with no adapter, with one LoRA on all linear layers, and with another LoRA for each row of eight; in float32 and
in four bits. All sides of one kind of weights run in one process and take turns. Each is called as its users call it,
for one token and for many: the difference, divided by the number of tokens between, is the time of a token. llama.cpp
and OpenVINO read GGUF files of the same values (OpenVINO reads float16, which it computes in float32); llama.cpp's
cache is float16, as it is by default. A second table has what each takes in a process of its own: seconds to load,
memory that no file backs, and how much longer the first token takes after a change of adapter. Perplexities are in
``benchmarks.quantised``.

Targets: lorac >= 1.0 of genai's base and >= 1.05 of its adapter at one row; in four bits >= 1.0 of genai's base with as
many bits in each layer, and of its mixed ones; >= 1.0 of llama.cpp with a
LoRA at 8 rows and at 32; and with eight different LoRAs at 8 rows.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _genai, common
from benchmarks import _gguf_engines as gguf
from lorac.native_library import find_native_library

LORAC, AGAIN, GENAI, PEFT = "lorac", "lorac, A/A", "genai", "PEFT"
NARROW, GENAI_MIXED = "lorac, all in int4", "genai, k_quant_mixed"
"""lorac as genai's builder stores four bits by default, and the builder with eight bits where lorac has them by default
and a few more."""
HALF = "lorac, float16 factors"
"""Factors as adapters' files mostly hold them: ``native="float16"``."""
VARIED = frozenset({LORAC, AGAIN, NARROW, HALF})
"""Sides that are lorac in ONNX Runtime."""
IN_OPENVINO = "lorac in OpenVINO"
NONE, ONE, EIGHT = "none", "one", "eight"
WEIGHTS = ("float32", "int4")
SHAPES = {"x1": (1, 64), "x8": (8, 64), "x32": (32, 64), "512": (1, 512)}
"""Rows and length of the prompts."""
FEW = {EIGHT: ("x8",), PEFT: ("x1", "x8", "512")}
"""Adapters or engine -> its shapes, where these are fewer: a LoRA for each row is measured at eight rows alone, and
PEFT takes minutes at 32."""
NAMES = tuple("abcdefgh")
"""The LoRAs."""
SIDES = {
    "float32": (
        *((LORAC, adapters) for adapters in (NONE, ONE, EIGHT)),
        (AGAIN, NONE),
        *((HALF, adapters) for adapters in (ONE, EIGHT)),
        *((GENAI, adapters) for adapters in (NONE, ONE)),
        *((gguf.LLAMA_CPP, adapters) for adapters in (NONE, ONE, EIGHT)),
        *((gguf.OPENVINO, adapters) for adapters in (NONE, ONE)),
        *((IN_OPENVINO, adapters) for adapters in (NONE, ONE, EIGHT)),
        *((PEFT, adapters) for adapters in (NONE, ONE, EIGHT)),
    ),
    "int4": (
        *((LORAC, adapters) for adapters in (NONE, ONE, EIGHT)),
        (AGAIN, NONE),
        (NARROW, NONE),
        *((HALF, adapters) for adapters in (ONE, EIGHT)),
        (GENAI, NONE),
        (GENAI_MIXED, NONE),
        *((gguf.LLAMA_CPP, adapters) for adapters in (NONE, ONE, EIGHT)),
        *((gguf.OPENVINO, adapters) for adapters in (NONE, ONE)),
        *((IN_OPENVINO, adapters) for adapters in (NONE, ONE, EIGHT)),
    ),
}
"""Weights -> engine and adapters. genai's builder puts no adapter over four bits, and only lorac, llama.cpp and PEFT
take another adapter for each row."""
OWN = {("int4", GENAI): NARROW}
"""Weights and engine -> lorac's side with as many bits in each layer; elsewhere its default."""
BOUNDS = {
    ("float32", GENAI, NONE, "x1"): 1.0,
    ("float32", GENAI, ONE, "x1"): 1.05,
    ("int4", GENAI, NONE, "x1"): 1.0,
    ("int4", GENAI_MIXED, NONE, "x1"): 1.0,
    ("int4", gguf.LLAMA_CPP, ONE, "x8"): 1.0,
    ("int4", gguf.LLAMA_CPP, ONE, "x32"): 1.0,
    ("int4", gguf.LLAMA_CPP, EIGHT, "x8"): 1.0,
}
"""How many times as fast as a side lorac is to be."""
MEMORY = "memory"
OPENVINO_TARGET = "openvino"
TARGETS = ("onnxruntime", *([OPENVINO_TARGET] if importlib.util.find_spec("openvino") else []))
"""Targets that lorac compiles for."""
Write = Callable[[Any, int, Sequence[str | None]], Any]
"""(ids (rows, length), how many tokens, an adapter or None per row) -> tokens or text per row."""


# ── What is prepared ─────────────────────────────────────────────────────────────────────────────────────────────────
def prepare(given: argparse.Namespace) -> None:
    """Write the model, the LoRAs in each engine's format, and each engine's model, where they are not there."""
    import lorac

    folder = _folder(given)
    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    model = common.host(given)
    common.save_host(model, folder / "model", given)
    common.save_peft(folder / "peft", given)
    adapter = lorac.load_adapter(folder / "peft", model)
    for seed, name in enumerate(NAMES):
        common.away_from_init(adapter, seed)
        lorac.save_adapter(adapter, folder / name, format="peft", model=model)
        if _has_gguf(given):
            lorac.save_adapter(adapter, folder / f"{name}.gguf", format="gguf", model=model)
            shutil.copy(folder / name / "adapter_model.safetensors", folder / f"{name}.safetensors")
    for weights in given.weights:
        for name, (adapters, options) in _programs(weights).items():
            lorac.compile(
                common.saved_host(folder / "model"),
                {name: folder / name for name in NAMES} if adapters == EIGHT else {},
                cache=True,
                threads=given.threads,
                self_test=False,
                **options,
            ).save(folder / name)
        for engine, adapters in SIDES[weights] if _genai.found(given) else ():
            if engine in {GENAI, GENAI_MIXED}:
                precision = {"float32": "fp32"}.get(weights, weights)
                told = (*_genai.LAST_LOGITS, *(["algo_config=k_quant_mixed"] if engine == GENAI_MIXED else []))
                built = folder / f"{engine}-{weights}-{adapters}"
                _genai.build(folder / "model", built, precision, folder / "a" if adapters == ONE else None, told)
    if _has_gguf(given):
        gguf.write_base(folder)
        if gguf.find_engine(gguf.OPENVINO, given):
            for weights in ("float16", "int4"):
                gguf.write_openvino(folder / f"{weights}.gguf", folder / f"openvino-{weights}")
    (folder / "ready").touch()


def _programs(weights: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the folder of each of lorac's programs -> its adapters and options."""
    four_bits = {"weights": weights} if weights == "int4" else {}
    programs = {
        f"{weights}-{adapters}-{target}": (adapters, {**four_bits, **options, "target": target})
        for adapters, options in ((NONE, {}), (EIGHT, {"mode": "live"}))
        for target in TARGETS
    }
    if four_bits:
        programs[f"{NARROW}-{NONE}"] = (NONE, {**four_bits, "head": "int4", "mixed": False, "target": TARGETS[0]})
    return programs


def _folder(given: argparse.Namespace) -> Path:
    """Where all that is kept: artifacts know how many threads they run on."""
    return Path(given.folder, f"{given.model}-{given.layers}-{given.rank}-{given.threads}")


def _has_gguf(given: argparse.Namespace) -> bool:
    """Whether one of the engines is here whose files are made of SmolLM2's own."""
    return given.model == common.SMOLLM2 and any(gguf.find_engine(name, given) for name in gguf.MODULES)


def sides(weights: str, given: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the sides that can be measured here: engine and adapters."""
    here = {LORAC, AGAIN, NARROW, PEFT, *([GENAI, GENAI_MIXED] if _genai.found(given) else [])}
    here |= {HALF} if find_native_library() is not None else set()
    here |= {IN_OPENVINO} if OPENVINO_TARGET in TARGETS else set()
    if given.model == common.SMOLLM2:
        here |= {name for name in gguf.MODULES if gguf.find_engine(name, given)}
    return [side for side in SIDES[weights] if side[0] in here]


# ── The sides ────────────────────────────────────────────────────────────────────────────────────────────────────────
def _open(engine: str, weights: str, adapters: str, rows: int, given: argparse.Namespace) -> Write:
    folder = _folder(given)
    length = max(length for _, length in SHAPES.values()) + given.tokens
    assert (engine, adapters) in sides(weights, given), "it is not here"
    if engine == gguf.LLAMA_CPP:
        files = [folder / f"{name}.gguf" for name in _named(adapters)]
        return gguf.open_llama_cpp(folder / f"{weights}.gguf", files, rows, length, given.threads)
    if engine == gguf.OPENVINO:
        files = [folder / f"{name}.safetensors" for name in _named(adapters)]
        model = folder / f"openvino-{ {'float32': 'float16'}.get(weights, weights) }"
        return gguf.open_openvino(model, files, given.threads, exact=weights == "float32")
    if engine in {GENAI, GENAI_MIXED}:
        built = folder / f"{engine}-{weights}-{adapters}"
        return functools.partial(_write_by_genai, _genai.load(built, given.threads))
    if engine == PEFT:
        return functools.partial(_write_by_peft, _open_peft(folder, adapters))
    import lorac

    target = OPENVINO_TARGET if engine == IN_OPENVINO else "onnxruntime"
    artifact = (
        f"{weights}-{NONE if adapters == NONE else EIGHT}-{target}" if engine != NARROW else f"{NARROW}-{adapters}"
    )
    options = {"native": "float16"} if engine == HALF else {}
    return functools.partial(_write_by_lorac, lorac.load(folder / artifact, **options))


def _named(adapters: str) -> Sequence[str]:
    """Return the LoRAs that an engine has: two of one, so that it can change."""
    return {NONE: (), ONE: NAMES[:2], EIGHT: NAMES}[adapters]


def _open_peft(folder: Path, adapters: str) -> Any:
    import peft

    model = common.saved_host(folder / "model")
    model.generation_config.eos_token_id = None
    if adapters == NONE:
        return model
    names = _named(adapters)
    wrapped = peft.PeftModel.from_pretrained(model, str(folder / names[0]), adapter_name=names[0])
    for name in names[1:]:
        wrapped.load_adapter(str(folder / name), adapter_name=name)
    return wrapped.eval()


def _write_by_peft(model: Any, ids: Any, count: int, adapters: Sequence[str | None]) -> Any:
    import torch

    options: dict[str, Any] = {}
    if len({*adapters}) > 1:
        options["adapter_names"] = [*adapters]
    elif adapters[0] is not None and model.active_adapter != adapters[0]:
        model.set_adapter(adapters[0])
    told = torch.from_numpy(ids)
    with torch.no_grad():
        written = model.generate(
            input_ids=told,
            attention_mask=torch.ones_like(told),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
    return written[:, ids.shape[1] :].tolist()


def _write_by_lorac(compiled: Any, ids: Any, count: int, adapters: Sequence[str | None]) -> Any:
    choice = [*adapters] if len({*adapters}) > 1 else adapters[0]
    options = {"max_new_tokens": count, "eos_token_id": None, "do_sample": False, "pad_token_id": 0}
    written = compiled.generate(input_ids=ids, attention_mask=ids * 0 + 1, adapters=choice, **options)
    return written[:, ids.shape[1] :].tolist()


def _write_by_genai(model: Any, ids: Any, count: int, adapters: Sequence[str | None]) -> Any:
    generator = _genai.begin(model, ids, ids.shape[1] + count)
    steps = [generator.get_next_tokens().tolist()]
    while len(steps) < count:
        generator.generate_next_token()
        steps.append(generator.get_next_tokens().tolist())
    return [list(row) for row in zip(*steps, strict=True)]


# ── Measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────
def jobs(given: argparse.Namespace) -> list[common.Job]:
    """The speeds of one kind of weights, all sides in turn; and the memory of each side by itself."""
    each = [(MEMORY, weights, *side) for weights in given.weights for side in sides(weights, given)]
    return [*((weights,) for weights in given.weights), *each]


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, Any]:
    """Return ``engine adapters`` -> shape -> seconds of a token (of the first one, for a long prompt); or memory."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        if job[0] == MEMORY:
            _, weights, engine, adapters = job
            return _measure_memory(weights, engine, adapters, given)
        (weights,) = job
        rows = max(SHAPES[label][0] for label in given.shapes)
        opened = {side: _open(side[0], weights, side[1], rows, given) for side in sides(weights, given)}
        found: dict[str, dict[str, float]] = {" ".join(side): {} for side in opened}
        for label in given.shapes:
            chosen = {side: write for side, write in opened.items() if all(label in FEW.get(of, SHAPES) for of in side)}
            for side, seconds in _measure_shape(label, chosen, given).items():
                found[" ".join(side)][label] = seconds
        return found
    finally:
        torch.set_num_threads(threads)  # a smoke run is not alone in its process


def _measure_shape(
    label: str, opened: dict[tuple[str, str], Write], given: argparse.Namespace
) -> dict[tuple[str, str], float]:
    """Return the median over rounds of each side, order shuffled in each."""
    rows, length = SHAPES[label]
    ids = common.tokens(given, (rows, length))["input_ids"]
    counts = (1,) if label == "512" else (1, given.tokens)
    times: dict[tuple[str, str], dict[int, list[float]]] = {side: {count: [] for count in counts} for side in opened}
    for turn in range(1 + given.rounds):
        for side in random.sample([*opened], len(opened)):
            for count in counts:
                write = functools.partial(opened[side], ids, count, _choose(side[1], rows))
                seconds = common.seconds(write)
                if turn:
                    times[side][count].append(seconds)
    medians = {side: [statistics.median(found) for found in each.values()] for side, each in times.items()}
    return {
        side: found[0] if label == "512" else (found[1] - found[0]) / (given.tokens - 1) / rows
        for side, found in medians.items()
    }


def _choose(adapters: str, rows: int) -> list[str | None]:
    """Return an adapter for each row."""
    return [{NONE: None, ONE: NAMES[0], EIGHT: NAMES[row % len(NAMES)]}[adapters] for row in range(rows)]


def _measure_memory(weights: str, engine: str, adapters: str, given: argparse.Namespace) -> dict[str, float]:
    """Return seconds to load, MiB that no file backs after eight tokens, and seconds that a change of adapter adds."""
    ids = common.tokens(given, (1, 8))["input_ids"]
    before, begun = common.anonymous(), time.perf_counter()
    write = _open(engine, weights, adapters, 1, given)
    loaded = time.perf_counter() - begun
    names: Sequence[str | None] = _named(adapters)[:2] or (None, None)
    write(ids, 8, [names[0]])
    found = {"load": loaded, "anonymous": common.anonymous() - before}
    if adapters == ONE and engine != GENAI:
        for name in names:
            write(ids, 1, [name])
        turns = {"same": (names[0], names[0]), "other": names}
        seconds: dict[str, list[float]] = {what: [] for what in turns}
        for _ in range(given.rounds):
            for what, (first, second) in turns.items():
                write(ids, 1, [first])
                seconds[what].append(common.seconds(lambda name=second: write(ids, 1, [name])))
        medians = {what: statistics.median(values) for what, values in seconds.items()}
        found["swap"] = medians["other"] - medians["same"]
    return found


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Return for each kind of weights the speeds, lorac's over each of them, and what each side takes."""
    return [table for weights in given.weights for table in _tables(weights, found, given)]


def _tables(weights: str, found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    speeds, measured = found[(weights,)], sides(weights, given)
    notes = [gguf.note(given), _genai.note(given), common.native_note()]
    again = {label: speeds[f"{LORAC} {NONE}"][label] / speeds[f"{AGAIN} {NONE}"][label] for label in given.shapes}
    shapes: Sequence[str] = given.shapes
    rows, held, taken = [], [], []
    for engine, adapters in measured:
        one, own = (speeds[f"{side} {adapters}"] for side in (engine, OWN.get((weights, engine), LORAC)))
        cells = [f"{1 / one[label]:.1f}" if label in one else "-" for label in shapes if label != "512"]
        first = [f"{one['512'] * 1e3:.0f}" if "512" in one else "-"] if "512" in shapes else []
        rows.append((engine, adapters, *cells, *first))
        if engine not in VARIED:
            ratios = {label: one[label] / own[label] for label in one}
            told = [_hold(ratios.get(label), BOUNDS.get((weights, engine, adapters, label))) for label in shapes]
            held.append((engine, adapters, *told))
        memory = found[(MEMORY, weights, engine, adapters)]
        swap = f"{memory['swap'] * 1e3:.1f}" if "swap" in memory else "-"
        taken.append((engine, adapters, f"{memory['load']:.2f}", f"{memory['anonymous']:.0f}", swap))
    title = f"{given.model}, {weights}, LoRA of rank {given.rank}, {given.threads} threads"
    columns = ("engine", "LoRAs", *("ms to first, 512" if label == "512" else f"tok/s {label}" for label in shapes))
    others = [side for side in measured if side[0] not in VARIED]
    return [
        common.Table(title, columns, rows, measured, again, notes),
        common.Table(f"lorac's speed over theirs, {weights}", ("engine", "LoRAs", *shapes), held, others, again),
        common.Table(
            f"a process of each, {weights}",
            ("engine", "LoRAs", "s to load", "anonymous MiB", "ms that a swap adds"),
            taken,
            measured,
            {},
        ),
    ]


def _hold(ratio: float | None, bound: float | None) -> str:
    """How many times as fast, beside its target, where it has one."""
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" + (f" ({'missed: ' if ratio < bound else ''}>= {bound:.2f})" if bound else "")


BENCHMARK = common.Benchmark(
    name="peers",
    text=__doc__,
    options=(
        common.TEXT_MODEL,
        common.layers(30),
        common.RANK,
        common.Option("rounds", 5, smoke=3, help="timed in each process, all sides in each; differences need several"),
        common.Option("tokens", 32, smoke=16, help="written behind each prompt"),
        common.Option("threads", 2, smoke=1, help="of every side"),
        common.Option("weights", WEIGHTS, smoke=("float32",), help="these kinds of weights"),
        common.Option("shapes", tuple(SHAPES), smoke=("x1", "x8", "512"), help="these rows and lengths of prompts"),
        gguf.OPTION,
        _genai.OPTION,
    ),
    jobs=jobs,
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
