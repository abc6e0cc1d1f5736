"""Many requests at once through `lorac.Scheduler`, beside one at a time and beside batches that wait for their longest.

    python -m benchmarks.serving [--model smollm2] [--weights float32 int4] [--chunk 0] [--rounds 3] [--processes 3]

The first table has tokens per second: 8 requests of one length, one after the other and together; then 24 of ragged
lengths, in batches of 8 by `generate` and through 8 rows of a scheduler, with one adapter or with 8 different ones.
"The engine alone" is the ceiling: as many of its calls with 8 rows as it takes where no row waits, and nothing else.

The second has waiting times: the first token where adapters on disk are as many as memory has room for, and one more;
between two tokens of 4 requests, alone and while the prompt of a fifth is read; and until a request that is cancelled
has left its row. The last is how many requests of a tenant with 100 of them begin after that of another has come.

Targets: together >= 4 x one at a time; rows >= 1.5 x batches; 8 adapters >= 0.8 x one; a first token with one adapter
more than there is room for <= 1.2 x; between tokens <= 1.5 x (of 95 %); a row free within 500 ms (of 95 %); none of the
other tenant's requests before it, beyond those at work.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import random
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bank, common

WEIGHTS = ("float32", "int4")
ROWS = 8
ALONE, TOGETHER, TOGETHER_MOST = "8, one at a time", "8 together", "8, the engine alone"
STATIC, RAGGED, AGAIN, MIXED = "ragged, in batches", "ragged, in rows", "ragged, in rows, A/A", "ragged, 8 adapters"
RAGGED_MOST = "ragged, the engine alone"
SPEEDS = {
    ALONE: ALONE,
    TOGETHER: ALONE,
    TOGETHER_MOST: ALONE,
    STATIC: STATIC,
    RAGGED: STATIC,
    RAGGED_MOST: STATIC,
    AGAIN: RAGGED,
    MIXED: RAGGED,
}
"""Side -> whose speed its own is divided by."""
FITS, FITS_AGAIN, ONE_MORE = "first token, all fit", "first token, A/A", "first token, one more"
QUIET, QUIET_AGAIN, READING = "between tokens, p95", "between tokens, p95, A/A", "beside a prompt, p95"
CANCEL, CANCEL_PROMPT = "cancelled, p95", "cancelled in its prompt, p95"
WAITS = {FITS: FITS, FITS_AGAIN: FITS, ONE_MORE: FITS, QUIET: QUIET, QUIET_AGAIN: QUIET, READING: QUIET}
BEGUN = "begun before the other tenant's"
LONG = 1500
"""The most tokens of an answer that is cancelled before."""


def prepare(given: argparse.Namespace) -> None:
    """Write the program with room for an adapter, for each kind of weights, and adapters on disk."""
    import lorac

    folder = Path(given.folder)
    bank.link_adapters(folder / "one", ["r"], given)
    bank.link_adapters(folder / "adapters", bank.numbered(range(ROWS + 1)), given)
    for weights in (kind for kind in given.weights if not (folder / kind).exists()):
        model = common.host(given)
        model.generation_config.eos_token_id = None
        options: dict[str, Any] = {} if weights == "float32" else {"weights": weights}
        adapters = {"a0": lorac.LoRA(r=given.rank, alpha=given.rank, targets="all-linear")}
        compiled = lorac.compile(
            model, adapters, target="onnxruntime", mode="live", cache=True, self_test=False, **options
        )
        compiled.save(folder / weights)


def measure(job: common.Job, given: argparse.Namespace) -> dict[str, Any]:
    """Figures of one kind of weights, in one process."""
    import lorac

    what, weights = job
    model = lorac.load(Path(given.folder, weights))
    return _speeds(model, given) if what == "speed" else _waits(model, given)


# ── Tokens per second ────────────────────────────────────────────────────────────────────────────────────────────────
def _speeds(model: Any, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of each token."""
    bank.add_copies(model, ROWS)
    names = [f"a{number}" for number in range(ROWS)]
    chance = random.Random(0)
    # Many answers are short and few are long, as those of people are.
    ragged = [min(1 + int(chance.expovariate(4 / given.tokens)), given.tokens) for _ in range(3 * ROWS)]
    even, lengths = [given.tokens // 2] * ROWS, [chance.randint(given.prompt // 2, given.prompt) for _ in ragged]
    prompts = [_prompt(given, length, seed) for seed, length in enumerate(lengths)]
    with _scheduler(model, given) as scheduler:

        def rows(counts: Sequence[int], own: Sequence[str]) -> common.Side:
            requests = [
                _request(prompt, count, name)
                for prompt, count, name in zip(prompts, counts, itertools.cycle(own), strict=False)
            ]
            return lambda: _read_all([scheduler.submit(request) for request in requests])

        sides = {
            ALONE: lambda: [one() for one in singles],
            TOGETHER: rows(even, names[:1]),
            TOGETHER_MOST: lambda: _run_engine(model, prompts[:ROWS], even, names[0]),
            STATIC: lambda: _generate_batches(model, prompts, ragged, names[0]),
            RAGGED: rows(ragged, names[:1]),
            RAGGED_MOST: lambda: _run_engine(model, prompts, ragged, names[0]),
            AGAIN: rows(ragged, names[:1]),
            MIXED: rows(ragged, names),
        }
        requests = [_request(prompt, even[0], names[0]) for prompt in prompts[:ROWS]]
        singles = [lambda request=request: _read_all([scheduler.submit(request)]) for request in requests]
        seconds = common.alternate(sides, given.rounds, warm_up=1, clock=common.CLOCKS[given.clock])
    tokens = {side: sum(even if SPEEDS[side] == ALONE else ragged) for side in sides}
    return {side: seconds[side] / tokens[side] for side in sides}


def _generate_batches(model: Any, prompts: Sequence[Any], counts: Sequence[int], adapter: str) -> None:
    """Generate for neighbouring requests together, until the longest of them has ended."""
    import torch

    for first in range(0, len(prompts), ROWS):
        batch, most = prompts[first : first + ROWS], max(counts[first : first + ROWS])
        ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_side="left")
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in batch], batch_first=True, padding_side="left"
        )
        model.generate(ids, attention_mask=mask, adapters=adapter, max_new_tokens=most, do_sample=False, pad_token_id=0)


def _run_engine(model: Any, prompts: Sequence[Any], counts: Sequence[int], adapter: str) -> None:
    """Make the fewest calls of the engine: prompts 8 at a time, and full steps for the other tokens."""
    import torch

    from lorac.frontend.components import MAIN_GRAPH
    from lorac.target.kv_cache import DecodeStep

    with model.hold(adapter) as held, torch.no_grad():
        program = held.program_of(model.engine)

        def decode(cache: Any, new: Sequence[int]) -> None:
            ids = torch.zeros(ROWS, max(new), dtype=torch.long)
            wanted = torch.tensor(new)[:, None] - 1
            program.decode(MAIN_GRAPH, cache, DecodeStep(ids=ids, counts=new, wanted=wanted)).argmax(-1)

        lengths, steps = [len(prompt) for prompt in prompts], math.ceil((sum(counts) - len(counts)) / ROWS)
        for first in range(0, len(lengths), ROWS):
            cache = model.engine.new_cache(MAIN_GRAPH, ROWS, max(lengths) + steps)
            decode(cache, lengths[first : first + ROWS])
        for _ in range(steps):
            decode(cache, [1] * ROWS)


# ── Waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def _waits(model: Any, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of waiting, and how many requests begin before another tenant's."""
    bank.add_copies(model, ROWS)
    with _scheduler(model, given) as scheduler:
        found = _between_tokens(scheduler, given) | _cancels(scheduler, given)
        found[BEGUN] = _begun_before(scheduler, given)
    for name in list(model.adapters):
        model.remove_adapter(name)
    with _scheduler(model, given) as scheduler:
        return found | _first_tokens(model, scheduler, given)


def _first_tokens(model: Any, scheduler: Any, given: argparse.Namespace) -> dict[str, float]:
    """Seconds to a first token, with adapters in turn: as many as memory has room for, and one more."""
    folder = Path(given.folder)
    model.register(folder / "one")  # what the first takes, such as a search of the model, no other does
    names = model.register(folder / "adapters")

    def first(seed: int, name: str) -> float:
        return common.seconds(
            lambda: _read_all([scheduler.submit(_request(_prompt(given, given.prompt, seed), 1, name))])
        )

    numbers = itertools.count()
    used = []
    for name in names[:3]:
        first(next(numbers), name)
        gc.collect()
        used.append(model.memory.used)
    each = used[2] - used[1]
    model.memory.limit = int(used[2] + (ROWS - 3 + 0.5) * each)
    times: dict[str, list[float]] = {FITS: [], FITS_AGAIN: [], ONE_MORE: []}
    for _ in range(given.rounds):
        for side, some in {FITS: names[:-1], FITS_AGAIN: names[:-1], ONE_MORE: names}.items():
            for _ in range(2):  # the second time in turn, each is in memory if all fit
                taken = [first(next(numbers), name) for name in some]
            times[side] += taken
    return {side: statistics.median(taken) for side, taken in times.items()}


def _between_tokens(scheduler: Any, given: argparse.Namespace) -> dict[str, float]:
    """Seconds between two tokens that 95 % are below, alone and while another request's prompt is read."""
    streams = [
        scheduler.submit(_request(_prompt(given, given.prompt, seed), LONG, f"a{seed}")) for seed in range(ROWS // 2)
    ]
    tokens = iter(streams[0])
    next(tokens)
    gaps: dict[str, list[float]] = {QUIET: [], QUIET_AGAIN: [], READING: []}
    for turn in range(given.rounds):
        for side in (QUIET, QUIET_AGAIN):
            gaps[side] += [common.seconds(lambda: next(tokens)) for _ in range(given.tokens)]
        other = scheduler.submit(_request(_prompt(given, given.long, 100 + turn), 1, f"a{ROWS - 1}"))
        while not other.reason:
            gaps[READING].append(common.seconds(lambda: next(tokens)))
    _end(scheduler, streams)
    return {side: _p95(found) for side, found in gaps.items()}


def _cancels(scheduler: Any, given: argparse.Namespace) -> dict[str, float]:
    """Seconds until a request has ended that was cancelled, among running ones and in its prompt."""
    times: dict[str, list[float]] = {CANCEL: [], CANCEL_PROMPT: []}
    for _ in range(given.rounds):
        streams = [
            scheduler.submit(_request(_prompt(given, given.prompt, seed), LONG, f"a{seed}")) for seed in range(ROWS - 1)
        ]
        readers = [iter(stream) for stream in streams]
        for reader in readers:
            next(reader)
        prompt = scheduler.submit(_request(_prompt(given, given.long, random.randrange(10**6)), 1, None))
        next(readers[0]), next(readers[0])  # it is being read
        times[CANCEL_PROMPT].append(_cancel(prompt))
        times[CANCEL] += [_cancel(stream) for stream in streams[: ROWS // 2]]
        _end(scheduler, streams)
    return {side: _p95(taken) for side, taken in times.items()}


def _cancel(stream: Any) -> float:
    """Cancel a request; return the seconds until its row was free."""
    begun = time.perf_counter()
    stream.cancel()
    _read_all([stream])
    return time.perf_counter() - begun


def _begun_before(scheduler: Any, given: argparse.Namespace) -> float:
    """Number of requests of a tenant with 100 that begin between another's submission and its beginning."""
    begun = dict[str, float]()

    def note(name: str, stream: Any) -> None:
        for _ in stream:
            begun.setdefault(name, time.perf_counter())

    def start(name: str, stream: Any) -> threading.Thread:
        thread = threading.Thread(target=note, args=(name, stream))
        thread.start()
        return thread

    prompt = _prompt(given, 4, 0)
    many = [scheduler.submit(_request(prompt, 2, "a0", tenant="many")) for _ in range(100)]
    threads = [start(f"many {number}", stream) for number, stream in enumerate(many)]
    while not begun:
        time.sleep(1e-3)
    came = time.perf_counter()
    threads.append(start("one", scheduler.submit(_request(prompt, 2, "a1", tenant="one"))))
    for thread in threads:
        thread.join()
    between = sum(came < moment < begun["one"] for name, moment in begun.items() if name != "one")
    return max(between - ROWS, 0)


def _end(scheduler: Any, streams: Iterable[Any]) -> None:
    """Cancel requests, and wait until they have left their rows."""
    for stream in streams:
        stream.cancel()
    while scheduler.load != (0, 0):
        time.sleep(1e-3)


# ── Requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _scheduler(model: Any, given: argparse.Namespace) -> Any:
    import lorac

    return lorac.Scheduler(model, rows=ROWS, waiting=128, chunk=given.chunk or None, prompt_cache=0)


def _prompt(given: argparse.Namespace, length: int, seed: int) -> Any:
    import torch

    return torch.randint(5, common.VOCABULARIES[given.model], (length,), generator=torch.Generator().manual_seed(seed))


def _request(prompt: Any, count: int, adapter: str | None, tenant: str = "") -> Any:
    import lorac

    options = {"max_new_tokens": count, "do_sample": False}
    return lorac.TextRequest(prompt, adapter, tenant=tenant, options=options)


def _read_all(streams: Iterable[Iterator[Any]]) -> None:
    for stream in streams:
        for _ in stream:
            pass


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[min(int(0.95 * len(values)), len(values) - 1)]


# ── Tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def tables(found: common.Found, given: argparse.Namespace) -> Sequence[common.Table]:
    """Return a table of speeds and one of waiting times."""
    return [_speed_table(found, given.weights), _wait_table(found, given.weights)]


def _speed_table(found: common.Found, weights: Sequence[str]) -> common.Table:
    seconds: Mapping[str, Any] = {kind: found[("speed", kind)] for kind in weights}
    rows = [
        (kind, side, f"{1 / seconds[kind][side]:.1f}", f"{seconds[kind][other] / seconds[kind][side]:.2f}")
        for kind in weights
        for side, other in SPEEDS.items()
    ]
    again = {kind: seconds[kind][AGAIN] / seconds[kind][RAGGED] for kind in weights}
    columns = ("weights", "requests", "tokens/s", "ratio")
    return common.Table("tokens per second", columns, rows, [row[:2] for row in rows], again)


def _wait_table(found: common.Found, weights: Sequence[str]) -> common.Table:
    rows: list[tuple[str, ...]] = []
    for kind in weights:
        figures = found[("wait", kind)]
        for side in (*WAITS, CANCEL, CANCEL_PROMPT):
            ratio = f"{figures[side] / figures[WAITS[side]]:.2f}" if side in WAITS else ""
            rows.append((kind, side, f"{1e3 * figures[side]:.1f}", ratio))
        rows.append((kind, BEGUN, f"{figures[BEGUN]:.0f}", ""))
    again = {
        f"{kind}, {side}": found[("wait", kind)][other] / found[("wait", kind)][side]
        for kind in weights
        for side, other in {FITS: FITS_AGAIN, QUIET: QUIET_AGAIN}.items()
    }
    columns = ("weights", "wait", "ms or requests", "ratio")
    return common.Table("waiting", columns, rows, [row[:2] for row in rows], again)


BENCHMARK = common.Benchmark(
    name="serving",
    text=__doc__,
    options=(
        common.TEXT_MODEL,
        common.layers(30),
        common.RANK,
        common.rounds(3),
        common.CLOCK,
        common.Option("weights", WEIGHTS, smoke=("float32",), help="of the base", choices=WEIGHTS),
        common.Option("chunk", 0, smoke=4, help="tokens of a prompt per step; 0: as the scheduler chooses"),
        common.Option("tokens", 48, smoke=4, help="of the longest answer"),
        common.Option("prompt", 32, smoke=6, help="tokens of the longest prompt"),
        common.Option("long", 512, smoke=40, help="tokens of the prompt that is read beside others"),
    ),
    jobs=lambda given: [(what, kind) for what in ("speed", "wait") for kind in given.weights],
    measure=measure,
    tables=tables,
    rooms=common.PROGRAM,
    prepare=prepare,
)

if __name__ == "__main__":
    BENCHMARK.main()
