"""Rows with adapters of their own in one call, beside the base, PEFT's `adapter_names` and a call per choice.

    python -m benchmarks.rows [--layers 20] [--rank 16] [--rounds 9] [--no-peft]
        [--weights float32 int4] [--rows 32] [--registered 2000] [--native auto]

A batch of 32 rows takes 1, 8 or 32 adapters, neighbours the same one, in ONNX Runtime or, with `--weights eager`, in
eager mode. All ratios are to the base of the same weights; PEFT's is to its own. "bytes" is how long the process takes
to read the bytes of the distinct adapters once. The groups of 9 adapters are of two sizes, so that each row takes a
place of its own.

A second table has thousands of registered adapters: a step of 32 rows over 8 of them, and the first token of one that
is read from disk.

A third table has one encoder with twenty classifiers, each row its own: of 2 to 77 labels, and all of 77.

``--native`` chooses whether the op of lorac-native is used ("auto": where it is installed).

Targets at one token, with that op: 8 adapters <= 1.20 (int4) and 1.10 (float32), 32 adapters <= 1.35 and 1.20, and
<= 1.15 x (base + bytes), 32 adapters at least 4 x as
fast as PEFT; at 16 tokens all <= 1.12; steps and first tokens within A/A however many are registered, each of which
takes at most 10 kB.
"""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bank, common
from campaigns.soak import resident

ROWS, DISTINCT = 32, (1, 8, 9, 32)
EAGER = "eager"
WEIGHTS = ("float32", "int4")
NATIVE: dict[str, bool | str] = {"auto": "auto", "no": False, "yes": True, "float16": "float16"}
BASE, AGAIN, CALLS, READ = "base", "A/A", "a call per choice", "bytes of all"
PEFT_BASE, PEFT = "PEFT's base", "PEFT, all"
STEP, FIRST, BYTES = "step", "first token", "bytes each"
_IN_A_STEP = 8
"""Adapters of the rows of a step, where thousands are registered."""
REGISTERED = "registered"
"""The job of the second table."""
CLASSIFIERS = "classifiers"
"""The job of the third table."""
SIZES, EQUAL, BY_SIZE = "2 to 77 labels", "77 labels each", "2 to 77 labels, a call per size"
_CLASSIFIERS = 20


def prepare(given: argparse.Namespace) -> None:
    """Compile the base and the program with room for an adapter, for each kind of weights; write what is registered."""
    import lorac

    known, stored = 0, Path(given.folder, "adapters")
    bank.link_adapters(stored / "one", ["r"], given)
    for count in counts(given):
        bank.link_adapters(stored / str(count), bank.numbered(range(known, count)), given)
        known = count
    folder, model = Path(given.folder), common.llama(given)
    for weights in (kind for kind in _emitted(given) if not (folder / kind).exists()):
        options: dict[str, Any] = {} if weights == "float32" else {"weights": weights}
        lorac.compile(model, {}, target="onnxruntime", **options).save(folder / weights / "base")
        adapters = {"a0": lorac.LoRA(r=given.rank, alpha=given.rank)}
        lorac.compile(model, adapters, target="onnxruntime", mode="live", **options).save(folder / weights / "live")


def counts(given: argparse.Namespace) -> Sequence[int]:
    """Return how many adapters are registered, each time more.

    Raises:
        SystemExit: they are too few for each first token to be that of another adapter.
    """
    least = _IN_A_STEP + given.rounds + common.WARM_UP
    if given.registered < least:
        raise SystemExit(f"--registered {given.registered} is too few for {given.rounds} rounds: at least {least}")
    return [count for count in (ROWS, 256) if least <= count <= given.registered - least] + [given.registered]


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds per call of all sides, in one process: tokens -> side -> seconds; or registered -> figure -> value."""
    (weights,) = job
    if weights == REGISTERED:
        return _measure_registered(given)
    if weights == CLASSIFIERS:
        return _measure_classifiers(given)
    live, base, again = _loaded(weights, given)
    bank.add_copies(live, given.rows)
    call = common.torch_call if weights == EAGER else common.call
    torch_sides = _peft_sides(given) if _has_peft(weights, given) else {}
    found = {}
    for length in (1, 16):
        inputs = common.tokens(given, (given.rows, length))
        sides = {BASE: call(base, inputs), AGAIN: call(again, inputs)}
        for distinct in _distinct(given):
            names = [f"a{row * distinct // given.rows}" for row in range(given.rows)]
            sides[str(distinct)] = call(functools.partial(live, adapters=names), inputs)
        sides[CALLS] = _call_per_choice(live, inputs, given.rows, call)
        sides |= {n: _peft_call(model, inputs, given.rows if n == PEFT else 0) for n, model in torch_sides.items()}
        found[str(length)] = common.alternate(sides, given.rounds)
        found[str(length)][READ] = _reading(live)
    return found


def _measure_registered(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Figures with more and more adapters registered: a step and a first token in seconds, bytes of memory of each."""
    import lorac

    folder = Path(given.folder)
    live = lorac.load(folder / _emitted(given)[0] / "live", native=NATIVE[given.native])
    base = lorac.load(folder / _emitted(given)[0] / "base")
    live.remove_adapter("a0")
    live.register(folder / "adapters" / "one")  # what the first takes, such as a search of the model, no other does
    inputs, first = common.tokens(given, (ROWS, 1)), common.tokens(given, (1, 16))
    found, known = {}, 0
    for count in counts(given):
        before = resident()
        names = live.register(folder / "adapters" / str(count))
        each = (resident() - before) / (count - known)
        fresh, known = iter(names[_IN_A_STEP:]), count
        step = common.call(live, {**inputs, "adapters": [names[row * _IN_A_STEP // ROWS] for row in range(ROWS)]})
        sides = {
            BASE: common.call(base, inputs),
            AGAIN: common.call(base, inputs),
            STEP: step,
            FIRST: lambda fresh=fresh: live(**first, adapters=next(fresh)),
        }
        found[str(count)] = {**common.alternate(sides, given.rounds), BYTES: each}
        gc.collect()
    return found


def _measure_classifiers(given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of a call of an encoder with a classifier for each row: tokens -> side -> seconds."""
    import torch
    import transformers

    import lorac

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024
    )
    host = transformers.BertForSequenceClassification(config).eval()
    lora = lorac.LoRA(r=given.rank, alpha=given.rank, targets=["query", "value"], modules_to_save=["classifier"])
    names, programs = [f"a{row}" for row in range(_CLASSIFIERS)], []
    for labels in ([2 + round(row * 75 / (_CLASSIFIERS - 1)) for row in range(_CLASSIFIERS)], [77] * _CLASSIFIERS):
        adapters = lorac.compile(host, dict.fromkeys(names, lora), active=None).adapters
        for name, count in zip(names, labels, strict=True):
            own = adapters[name].replaced
            own |= {key: torch.randn(count, *tensor.shape[1:]) for key, tensor in own.items()}
        programs.append(lorac.compile(host, adapters, target="onnxruntime", active=None))
    found = {}
    for length in (1, 16, 128):
        inputs = {"input_ids": torch.randint(5, 1000, (_CLASSIFIERS, length)).numpy()}
        mixed, equal = programs
        found[str(length)] = common.alternate(
            {
                BASE: common.torch_call(mixed, inputs),
                AGAIN: common.torch_call(mixed, inputs),
                SIZES: common.torch_call(functools.partial(mixed, adapters=names), inputs),
                EQUAL: common.torch_call(functools.partial(equal, adapters=names), inputs),
                BY_SIZE: _call_per_choice(mixed, inputs, _CLASSIFIERS, common.torch_call),
            },
            given.rounds,
        )
    return found


def _emitted(given: argparse.Namespace) -> list[str]:
    return [weights for weights in given.weights if weights != EAGER]


def _loaded(weights: str, given: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Return the program with an adapter, its base, and a second one of that."""
    import lorac

    if weights == EAGER:
        model = common.llama(given)
        return lorac.compile(model, {"a0": lorac.LoRA(r=given.rank, alpha=given.rank)}, mode="live"), model, model
    folder = Path(given.folder, weights)
    return (
        lorac.load(folder / "live", native=NATIVE[given.native]),
        lorac.load(folder / "base"),
        lorac.load(folder / "base"),
    )


def _distinct(given: argparse.Namespace) -> list[int]:
    return [count for count in DISTINCT if count <= given.rows]


def _has_peft(weights: str, given: argparse.Namespace) -> bool:
    return given.peft and weights in {WEIGHTS[0], EAGER}


def _call_per_choice(live: Any, inputs: dict[str, Any], rows: int, call: Callable[..., common.Side]) -> common.Side:
    def of_row(row: int) -> common.Side:
        own = {name: value[row : row + 1] for name, value in inputs.items()}
        return call(functools.partial(live, adapters=f"a{row}"), own)

    each = [of_row(row) for row in range(rows)]
    return lambda: [one() for one in each]


def _reading(live: Any) -> float:
    """Seconds to read all adapters once, with torch's threads: the median of five."""
    import torch

    tensors = [tensor for adapter in live.adapters.values() for tensor in adapter.parameters()]
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        flat.sum()
        times.append(time.perf_counter() - begun)
    return sorted(times)[2]


def _peft_sides(given: argparse.Namespace) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules="all-linear", init_lora_weights=False)
    wrapped = get_peft_model(common.llama(given), config, "a0")
    for index in range(1, given.rows):
        wrapped.add_adapter(f"a{index}", config)
    return {PEFT_BASE: common.llama(given), PEFT: wrapped.eval()}


def _peft_call(model: Any, inputs: dict[str, Any], mixed: int) -> common.Side:
    names = {"adapter_names": [f"a{row}" for row in range(mixed)]} if mixed else {}
    return common.torch_call(lambda **tensors: model(**tensors, **names), inputs)


def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """One table for each kind of weights, and one of registered adapters: milliseconds, and ratios to the base last."""
    rest = {weights: figures for (weights,), figures in found.items()}
    further = [_registered_table(rest.pop(REGISTERED))] if REGISTERED in rest else []
    further += [_classifiers_table(rest.pop(CLASSIFIERS))] if CLASSIFIERS in rest else []
    return [*(_table(weights, by_length, given) for weights, by_length in rest.items()), *further]


def _classifiers_table(found: Any) -> common.Table:
    rows = [
        (f"{_CLASSIFIERS}x{length}", what, f"{seconds * 1e3:.1f}", f"{seconds / sides[BASE]:.3f}")
        for length, sides in found.items()
        for what, seconds in sides.items()
    ]
    again = {f"{_CLASSIFIERS}x{length}": sides[AGAIN] / sides[BASE] for length, sides in found.items()}
    title = "twenty classifiers of one encoder, each row its own, in ONNX Runtime"
    return common.Table(title, ("shape", "side", "ms", "ratio"), rows, [row[:2] for row in rows], again)


def _registered_table(found: Any) -> common.Table:
    rows = [
        (count, what, f"{figures[what] * 1e3:.1f}", f"{figures[what] / figures[BASE]:.3f}")
        for count, figures in found.items()
        for what in (STEP, FIRST)
    ]
    rows += [(count, BYTES, f"{figures[BYTES]:.0f}", "") for count, figures in found.items()]
    promised = [row[:2] for row in rows]
    again = {count: figures[AGAIN] / figures[BASE] for count, figures in found.items()}
    return common.Table("registered adapters", ("registered", "of", "ms or bytes", "ratio"), rows, promised, again)


def _table(weights: str, by_length: Any, given: argparse.Namespace) -> common.Table:
    rows, again, most = [], {}, str(_distinct(given)[-1])
    for length, sides in by_length.items():
        shape = f"{given.rows}x{length}"
        for name in _names(weights, given):
            base = PEFT_BASE if name in {PEFT_BASE, PEFT} else BASE
            rows.append((shape, name, f"{sides[name] * 1e3:.1f}", f"{sides[name] / sides[base]:.3f}"))
        again[shape] = sides[AGAIN] / sides[BASE]
        bound = sides[most] / (sides[BASE] + sides[READ])
        rows.append((shape, f"{most} / (base + bytes)", "", f"{bound:.3f}"))
        if PEFT in sides:
            rows.append((shape, f"{PEFT} / {most}", "", f"{sides[PEFT] / sides[most]:.2f}"))
    title = f"{given.rows} rows over distinct adapters, {weights}, native op: {given.native}"
    return common.Table(title, ("shape", "side", "ms", "ratio"), rows, promised(weights, given), again)


def _names(weights: str, given: argparse.Namespace) -> list[str]:
    peft = [PEFT_BASE, PEFT] if _has_peft(weights, given) else []
    return [BASE, AGAIN, *map(str, _distinct(given)), CALLS, READ, *peft]


def promised(weights: str, given: argparse.Namespace) -> Sequence[tuple[str, str]]:
    """Return the first cells of a table."""
    most = _distinct(given)[-1]
    names = [*_names(weights, given), f"{most} / (base + bytes)"]
    names += [f"{PEFT} / {most}"] if _has_peft(weights, given) else []
    return [(f"{given.rows}x{length}", name) for length in (1, 16) for name in names]


BENCHMARK = common.Benchmark(
    name="rows",
    text=__doc__,
    options=(
        common.MODEL,
        common.layers(20),
        common.RANK,
        common.rounds(9),
        common.Option(
            "weights", WEIGHTS, smoke=("float32",), help="of the base, or eager mode", choices=(*WEIGHTS, EAGER)
        ),
        common.Option("rows", ROWS, smoke=ROWS, help="of a batch over distinct adapters"),
        common.Option("native", "auto", smoke="no", help="whether lorac-native is used", choices=tuple(NATIVE)),
        common.Option("peft", True, smoke=True, help="measure PEFT too"),
        common.Option("registered", 2000, smoke=32, help="adapters on disk, in the end"),
    ),
    jobs=lambda given: [(kind,) for kind in (*given.weights, *([REGISTERED, CLASSIFIERS] if _emitted(given) else []))],
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
