"""Random operations on compiled models for as long as asked, by several threads at once, with failures and interrupts.

python -m campaigns.soak [--operations N] [--seed N] [--processes N] [--json FILE]

Ten methods on one small host, some of whose layers have a forward of their own or are read by others, in eager, in ONNX
Runtime and, where it is installed, in OpenVINO, live and fused. One thread swaps, and is interrupted by signals and by
failures injected into what it calls; another adds and removes adapters, and fails at it; others call, with the active
choice, with one of their own, or with one for each row. Now and then the model is saved and loaded. Every answer is
held against the bits of a fresh model of that choice: a mismatch belongs to another choice than the one that was active
for certain, or to none. Errors are counted where they are none of lorac's.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import gc
import importlib.util
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

import psutil
import torch
from torch import nn

import lorac
from campaigns.tally import report, wrong
from lorac.testing import adapter_away

TARGETS = ("eager", "onnxruntime", *["openvino"] * (importlib.util.find_spec("openvino") is not None))
ENGINES = [(target, mode) for target in TARGETS for mode in ("live", "fused")]
WHERE = ("up", "down", "head")
EVERYWHERE = (*WHERE, "embed", "mix")
METHODS: dict[str, lorac.WeightVariant | lorac.BranchVariant] = {
    "lora": lorac.LoRA(r=3, alpha=5, targets=EVERYWHERE),
    "dora": lorac.DoRA(r=2, alpha=3, targets=("up", "head")),
    "ia3": lorac.IA3(targets=WHERE),
    "shira": lorac.SHiRA(r=1, targets=WHERE),
    "hydra": lorac.Hydra(r=2, r_sequential=1, targets=("down", "head")),
    "vera": lorac.VeRA(r=3, targets=WHERE),
    "loha": lorac.LoHa(r=1, targets=("up", "down")),
    "hra": lorac.HRA(r=2, targets=("up", "head")),
    "miss": lorac.MiSS(r=2, targets=("up", "down")),
    "bat": lorac.BAT(r=4, targets=("up",)),
}
MIXTURES: list[Any] = [
    {"lora": 0.7, "dora": 0.3},
    {"shira": 1.0, "lora": -0.5},
    {"ia3": 0.5},
    {"bat": 0.6, "hydra": 0.4},
    {"vera": 1.0, "miss": 1.0, "loha": 0.2},
]
X = torch.randint(0, 23, (3, 4), generator=torch.Generator().manual_seed(1))
ROUND = 2000
"""Operations of the swapping thread between two looks at the whole."""
CALLERS = 2
ROW_CHOICES = 12
"""Batches whose rows have choices of their own."""
PATIENCE = 120.0
"""Seconds without an operation after which a model counts as hanging."""


class Interrupted(BaseException):
    """What the signal raises in the swapping thread."""


class Injected(MemoryError):
    """A failure in what a swap or an addition calls."""


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    embed_scale = 1.5

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.embed_scale


class CastingLinear(nn.Linear):
    """One that computes in its weight's dtype, whatever it is given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class Product(nn.Linear):
    """As Falcon's."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input @ self.weight.T


class Host(nn.Module):
    """Layers with a forward of their own, one whose weight is only read, and one that is called and read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = ScaledEmbedding(23, 8)
        self.up = CastingLinear(8, 12)
        self.down = Product(12, 6, bias=False)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.down(nn.functional.gelu(self.up(self.embed(tokens)))))
        mix, head = self.mix, self.head
        mixed = nn.functional.linear(hidden, mix.weight, mix.bias)
        answer: torch.Tensor = head(mixed) + nn.functional.linear(hidden, head.weight)
        return answer


def bits(value: Any) -> bytes:
    """Return a tensor's bytes."""
    found: bytes = value.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return found


# ── What is tried ────────────────────────────────────────────────────────────────────────────────────────────────────
class Flaky:
    """Makes a method of an object fail for the thread that asks for it, once."""

    def __init__(self, owner: Any, name: str) -> None:
        self._honest, self._armed = getattr(owner, name), threading.local()
        setattr(owner, name, self._call)

    def arm(self) -> None:
        """Fail at this thread's next call."""
        self._armed.now = True

    def disarm(self) -> None:
        """Or not at all."""
        self._armed.now = False

    def _call(self, *given: Any, **named: Any) -> Any:
        if getattr(self._armed, "now", False):
            self._armed.now = False
            raise Injected
        return self._honest(*given, **named)


class Model:
    """A compiled model, what it must answer to every choice, and where it can be made to fail.

    Args:
        target, mode: how it is compiled.
        adapters: by name.
        choices: what is swapped to.
        folder: an empty folder.
    """

    def __init__(
        self, target: str, mode: str, adapters: dict[str, lorac.Adapter], choices: Sequence[Any], folder: Path
    ) -> None:
        self.target, self.mode, self.choices, self.folder = target, mode, choices, folder
        self.adapters = adapters
        self.compiled = self.fresh(None)
        self.compiled.save(folder / "start")
        self.stored = {str(choice): bits(self._loaded(choice)(tokens=X)) for choice in choices}
        # An emitted program answers as it does when stored; eager runs the host, and a stored program rounds otherwise.
        anew = {str(c): bits(self.fresh(c)(tokens=X)) for c in choices} if target == "eager" else {}
        self.expected = {**self.stored, **anew}
        self.known = frozenset(self.expected.values())
        draw = random.Random(len(choices))
        self.rows = [[draw.choice(choices) for _ in X] for _ in range(ROW_CHOICES)]
        alone = self.fresh(None)
        self.expected.update({str(rows): bits(alone(tokens=X, adapters=rows)) for rows in self.rows})
        buffers = self.compiled.engine.buffers if mode == "fused" else {}
        self.flaky = [Flaky(buffer, "write") for buffer in buffers.values()] or [Flaky(self.compiled.engine, "bind")]

    def fresh(self, choice: Any) -> lorac.Compiled:
        """Compile a model with a choice active."""
        return compile_host(self.target, self.mode, self.adapters, active=choice)

    def _loaded(self, choice: Any) -> lorac.Compiled:
        loaded = lorac.load(self.folder / "start")
        loaded.swap(choice)
        return loaded

    def saved_and_loaded(self) -> bool:
        """Whether a copy by way of the disk has the same choice and answers as such copies do."""
        self.compiled.save(self.folder / "now")
        loaded = lorac.load(self.folder / "now")
        spec = next(choice for choice in self.choices if _active(choice) == loaded.active)
        return loaded.active == self.compiled.active and bits(loaded(tokens=X)) == self.stored[str(spec)]


def compile_host(target: str, mode: str, adapters: Any, **rest: Any) -> lorac.Compiled:
    """Compile the host, which has the same weights each time."""
    torch.manual_seed(0)
    more = {} if target == "eager" else {"threads": 1, "self_test": False}
    return lorac.compile(Host().eval(), adapters, target, {"tokens": X}, mode, **more, **rest)


def _active(choice: Any) -> dict[str, float]:
    return {} if choice is None else {choice: 1.0} if isinstance(choice, str) else choice


def make_models(methods: Sequence[str], folder: Path) -> list[Model]:
    """Return a model for each engine, with adapters of some of METHODS."""
    torch.manual_seed(0)
    host, models = Host().double().eval(), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "adapters have no effect at 'mix'")
        drawn = enumerate(methods)
        adapters = {name: adapter_away(METHODS[name], host, X, name=name, seed=index) for index, name in drawn}
        mixtures = [choice for choice in MIXTURES if choice.keys() <= adapters.keys()]
        choices = [None, *adapters, *mixtures]
        for target, mode in ENGINES:
            (folder / f"{target}-{mode}").mkdir()
            with torch.no_grad():  # else eager computes from the tensors that train, and rounds otherwise
                models.append(Model(target, mode, adapters, choices, folder / f"{target}-{mode}"))
    return models


M = TypeVar("M", bound=Model)


class Soak(Generic[M]):
    """One process' share.

    Args:
        seed: of everything random.
        models: what operations are on.
    """

    def __init__(self, seed: int, models: Sequence[M]) -> None:
        self.chance, self.count, self.models = random.Random(seed), Counter[str](), models
        self.swaps = [self._swap] * 20 + [self._failing_swap] * 2 + [self._interrupted] * 2
        self._may_interrupt = False
        signal.signal(signal.SIGALRM, self._interrupt)

    def run(self, operations: int) -> dict[str, Any]:
        """Run the operations; return what came of them."""
        begun, start = time.monotonic(), 0
        while self._done() < operations and not self.count["hang"]:
            self._round(self.models[self.chance.randrange(len(self.models))])
            if not start and self._done() >= operations / 10:
                start = resident()
        end = resident()
        return {"count": dict(self.count), "start": start, "end": end, "seconds": time.monotonic() - begun}

    def _done(self) -> int:
        return sum(number for kind, number in self.count.items() if not kind.startswith(("wrong", "untyped", "hang")))

    def _round(self, model: M) -> None:
        """One model for a while: this thread swaps, others add and call."""
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        stop = threading.Event()
        others: list[Callable[[M, random.Random], None]] = [self._add, *[self._call] * CALLERS]
        threads = [
            threading.Thread(target=self._until, args=(stop, model, work, random.Random(self.chance.random())))
            for work in others
        ]
        for thread in threads:
            thread.start()
        for _ in range(ROUND):
            self._typed(self.chance.choice(self.swaps), model)
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)
        self.count["hang"] += sum(thread.is_alive() for thread in threads)
        self._typed(self._save, model)
        faulthandler.cancel_dump_traceback_later()

    def _until(self, stop: threading.Event, model: M, work: Callable[..., None], chance: random.Random) -> None:
        while not stop.is_set():
            self._typed(work, model, chance)

    def _typed(self, work: Callable[..., None], *given: Any) -> None:
        """One operation. Whatever it raises that it did not provoke is counted, and shown once."""
        try:
            with torch.no_grad():
                work(*given)
        except Exception as error:
            kind = f"untyped {type(error).__name__}: {error}"[:300]
            if kind not in self.count:
                faulthandler.dump_traceback(all_threads=False)
                sys.excepthook(type(error), error, error.__traceback__)
            self.count[kind] += 1

    def _held(self, kind: str, right: bool) -> None:
        self.count[kind] += 1
        if not right:
            self.count[f"wrong {kind}"] += 1

    # --- the swapping thread's ---------------------------------------------------------------------------------

    def _swap(self, model: M) -> None:
        choice = self.chance.choice(model.choices)
        model.compiled.swap(choice)
        self._held(f"swap, {model.target}", bits(model.compiled(tokens=X)) == model.expected[str(choice)])

    def _failing_swap(self, model: M) -> None:
        """Weights are written for this choice and then fail, or it is kept from being bound."""
        before, choice = model.compiled.active, self.chance.choice(model.choices)
        flaky = self.chance.choice(model.flaky)
        flaky.arm()
        try:
            model.compiled.swap(choice)
        except Injected:
            choice = next(known for known in model.choices if _active(known) == before)
        finally:
            flaky.disarm()
        right = bits(model.compiled(tokens=X)) == model.expected[str(choice)]
        self._held("failing swap", right and model.compiled.active == _active(choice))

    def _interrupted(self, model: M) -> None:
        """Send a signal within a swap or a call, or after it."""
        before, choice = model.compiled.active, self.chance.choice(model.choices)
        own = self.chance.random() < 0.3
        choice = self.chance.choice(model.rows) if own and self.chance.random() < 0.5 else choice
        try:
            self._may_interrupt = True
            signal.setitimer(signal.ITIMER_REAL, self.chance.uniform(1e-5, 2e-3))
            self._call_or_swap(model, own, choice)
            self._may_interrupt = False  # the signal may have come, and its handler not yet have run
        except Interrupted:
            self.count["interrupts that hit"] += 1
        finally:
            self._may_interrupt = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        torch.set_grad_enabled(False)  # an interrupt within torch's own way out of no_grad() leaves it as it is
        active = model.compiled.active
        there = next(known for known in model.choices if _active(known) == active)
        right = bits(model.compiled(tokens=X)) == model.expected[str(there)]
        self._held("interrupted", right and active in (before, before if own else _active(choice)))

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._may_interrupt:
            self._may_interrupt = False
            raise Interrupted

    def _call_or_swap(self, model: M, own: bool, choice: Any) -> None:
        if own:
            model.compiled(tokens=X, adapters=choice)
        else:
            model.compiled.swap(choice)

    def _save(self, model: M) -> None:
        self._held("save and load", model.saved_and_loaded())

    # --- the others' -------------------------------------------------------------------------------------------

    def _call(self, model: M, chance: random.Random) -> None:
        if chance.random() < 0.7:
            self._held(f"call, {model.target}", bits(model.compiled(tokens=X)) in model.known)
            return
        kind, choices = chance.choice((("its own choice", model.choices), ("choices by row", model.rows)))
        choice = chance.choice(choices)
        right = bits(model.compiled(tokens=X, adapters=choice)) == model.expected[str(choice)]
        self._held(f"call of {kind}, {model.target}", right)

    def _add(self, model: M, chance: random.Random) -> None:
        """Add an adapter under a name of its own, call it, remove it; and one that fails half-way."""
        name, given = chance.choice(("new", "items", "a.b", "a/b")), chance.choice(list(model.adapters))
        fails = chance.random() < 0.2
        if fails:
            model.flaky[0].arm()
        try:
            model.compiled.add_adapter(model.adapters[given], name=name)
        except Injected:
            self._held("failing addition", name not in model.compiled.adapters)
            return
        finally:
            model.flaky[0].disarm()
        self._held("addition", bits(model.compiled(tokens=X, adapters=name)) == model.expected[given])
        model.compiled.remove_adapter(name)
        self._held("removal", name not in model.compiled.adapters)
        time.sleep(0.01)  # it is the dearest of all, and must not be all that happens


def prepare_process() -> None:
    """Compute in one thread, and drop an interrupt that comes while an object is let go, as Python does."""
    before = sys.unraisablehook

    def unless_interrupted(given: Any) -> None:
        if not isinstance(given.exc_value, Interrupted):
            before(given)

    sys.unraisablehook = unless_interrupted
    torch.set_num_threads(1)


def resident() -> int:
    """Return the bytes of this process in memory, without free ones that the C library keeps for itself."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    found: int = psutil.Process().memory_info().rss
    return found


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────
def share(given: tuple[int, int]) -> dict[str, Any]:
    """One process' share: (seed, operations) -> what came of it."""
    seed, operations = given
    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        return Soak(seed, make_models([*METHODS], Path(folder))).run(operations)


def main(work: Callable[[tuple[int, int]], dict[str, Any]], text: str | None) -> None:
    """Run the work of each process as the command line says; ends with 1 where something happened that must not."""
    program = f"python -m campaigns.{Path(sys.argv[0]).stem}"
    parser = argparse.ArgumentParser(program, description=text, formatter_class=_AsWritten)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    shares = [(given.seed + i, given.operations // given.processes) for i in range(given.processes)]
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(work, shares))
    print(report(found))
    if given.json:
        given.json.write_text(json.dumps({"seed": given.seed, "processes": found}, indent=1), encoding="utf-8")
    if bad := wrong(found):
        raise SystemExit(f"failed: {bad}")


class _AsWritten(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The text as it is, and defaults."""


if __name__ == "__main__":
    main(share, __doc__)
