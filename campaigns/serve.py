"""Thousands of requests for text through a scheduler, whose clients leave and are killed while adapters come and go.

python -m campaigns.serve [--requests N] [--adapters N] [--rows N] [--seed N] [--json FILE]

Requests arrive at random for adapters on disk, of which memory has room for as many of the largest requests as there
are rows: greedy and sampled ones, mixtures, prompts that begin alike, several tenants. Some clients leave early, or are
killed with their event loop; some have a deadline. Meanwhile adapters are unloaded and loaded again, with other values.
Every token is held against what ``generate`` answers alone with an adapter that was loaded then. At the end nothing may
be left: rows, held adapters, bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lorac
from campaigns.soak import resident
from campaigns.tally import report, wrong

VOCABULARY = 48
VARIANTS: tuple[Any, ...] = (
    lorac.LoRA(r=4, targets="all-linear"),
    lorac.LoRA(r=1, targets=["q_proj", "down_proj"]),
    lorac.DoRA(r=2, targets=["v_proj", "up_proj"]),
    lorac.IA3(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"]),
)
CHANGING = 10
"""One of so many adapters is loaded and unloaded meanwhile, in two versions."""
CLIENTS = 48
CASES = 600
PATIENCE = 300.0
"""Seconds without an answer after which the scheduler counts as hanging."""


@dataclass(frozen=True, eq=False)
class Case:
    """A request, of which clients send many.

    Attributes:
        request: what they send.
        answers: the tokens that ``generate`` answers alone, with any versions of its adapters.
    """

    request: lorac.TextRequest
    answers: tuple[list[int], ...]

    @property
    def changes(self) -> bool:
        """Whether its adapters may be gone."""
        return len(self.answers) > 1

    def begins_with(self, tokens: Sequence[int]) -> bool:
        """Return whether an answer begins with some tokens."""
        return any(answer[: len(tokens)] == list(tokens) for answer in self.answers)


class Store:
    """A model, and adapters on disk, each in a folder of its own: one version, or two.

    Args:
        folder: an empty folder.
        count: number of adapters.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        host = _host()
        made = lorac.compile(
            host,
            {f"v{number}": variant for number, variant in enumerate(VARIANTS)},
            target="onnxruntime",
            mode="live",
            reserve=lorac.Reserve(adapters=2),
            cache=True,
            self_test=False,
            threads=1,
            spinning=False,
        )
        kinds = list(made.adapters.values())
        for kind in kinds:
            made.remove_adapter(kind.name)
        made.save(folder / "model")
        self.names = [f"a{number}" for number in range(count)]
        self.changing = self.names[::CHANGING]
        for number, name in enumerate(self.names):
            for version in range(2 if name in self.changing else 1):
                adapter = _with_values(kinds[number % len(kinds)], name, seed=2 * number + version)
                lorac.save_adapter(adapter, self.path(name, version) / name, model=host)

    def path(self, name: str, version: int = 0) -> Path:
        """Return the folder that holds a version of an adapter's folder."""
        return self.folder / f"version{version}" / name

    def load(self) -> lorac.Compiled:
        """Return the model with all adapters registered, in their first versions."""
        loaded = lorac.load(self.folder / "model")
        for name in self.names:
            loaded.register(self.path(name))
        return loaded

    def size(self, case: Case) -> int:
        """Return the bytes that the adapters of a request take on disk."""
        files = (file for name in _names(case.request.adapters) for file in self.path(name).rglob("*"))
        return sum(file.stat().st_size for file in files if file.is_file())

    def cases(self, chance: random.Random) -> list[Case]:
        """Return random requests with their answers."""
        model = self.load()
        shared = [_prompt(chance, 12) for _ in range(8)]
        cases = []
        for seed in range(CASES):
            begin = chance.choice(shared)[: chance.randrange(12)]
            ids = torch.cat([begin, _prompt(chance, chance.randrange(1, 8))])
            options: dict[str, Any] = {"max_new_tokens": chance.randrange(1, 10), "do_sample": chance.random() < 0.5}
            if options["do_sample"]:
                options |= {"temperature": chance.choice([0.6, 1.4]), "top_k": chance.choice([4, 20])}
            request = lorac.TextRequest(
                ids, self._choice(chance), seed, tenant=str(chance.randrange(4)), options=options
            )
            cases.append(Case(request, tuple(self._answer(model, request))))
        return cases

    def _answer(self, model: lorac.Compiled, request: lorac.TextRequest) -> Iterator[list[int]]:
        """Answer a request with each version of each of its adapters, in turn."""
        changing = [name for name in _names(request.adapters) if name in self.changing]
        for versions in itertools.product(range(2), repeat=len(changing)):
            for name, version in zip(changing, versions, strict=True):
                model.remove_adapter(name)
                model.register(self.path(name, version))
            yield _alone(model, request)

    def _choice(self, chance: random.Random) -> Any:
        one, other = chance.sample(self.names, 2)
        return chance.choice([one, one, one, one, None, {one: 0.5}, {one: 0.7, other: 0.3}])


def _host() -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0
    )
    return transformers.LlamaForCausalLM(config).eval()


def _with_values(adapter: lorac.Adapter, name: str, seed: int) -> lorac.Adapter:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        path: {n: tensor.detach() + 0.4 * torch.randn(tensor.shape, generator=generator) for n, tensor in at.items()}
        for path, at in adapter.tensors.items()
    }
    return dataclasses.replace(adapter, name=name, tensors=tensors)


def _prompt(chance: random.Random, length: int) -> torch.Tensor:
    return torch.tensor([chance.randrange(3, VOCABULARY) for _ in range(length)], dtype=torch.int64)


def _names(choice: Any) -> Sequence[str]:
    return [] if choice is None else [choice] if isinstance(choice, str) else list(choice)


def _alone(model: lorac.Compiled, request: lorac.TextRequest) -> list[int]:
    found = model.generate(request.ids[None], adapters=request.adapters, seed=request.seed, **request.options)
    answer: list[int] = found[0, len(request.ids) :].tolist()
    return answer


# ── Clients ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Load:
    """Clients of a scheduler, and whoever changes its adapters.

    Args:
        store: the model and its adapters.
        rows: the most requests at work; memory has room for as many of the largest.
        seed: of everything random.
    """

    def __init__(self, store: Store, rows: int, seed: int) -> None:
        self.store, self.chance, self.count = store, random.Random(seed), Counter[str]()
        self.cases = store.cases(self.chance)
        self.compiled = store.load()
        self._before = self.compiled.memory.used
        self.scheduler = lorac.Scheduler(self.compiled, rows=rows, waiting=32, chunk=4, prompt_cache=1 << 16)
        self.rows, self._sent, self._requests, self._start = rows, 0, 0, 0

    def run(self, requests: int) -> dict[str, Any]:
        """Send the requests; return what came of them."""
        begun, self._requests = time.monotonic(), requests
        with self._running():
            self._set_budget()
            stop = threading.Event()
            changes = threading.Thread(target=self._change, args=(stop, random.Random(self.chance.random())))
            changes.start()
            asyncio.run(self._send_all())
            stop.set()
            changes.join()
        if not self.count["hang"]:
            self._end()
        seconds = time.monotonic() - begun
        return {"count": dict(self.count), "start": self._start, "end": resident(), "seconds": seconds}

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Answer requests until the block ends."""
        yield

    def _set_budget(self) -> None:
        """Give memory room for the rows' places, and for the adapters of as many of the largest requests."""
        widest = sorted(self.cases, key=self.store.size, reverse=True)[: self.rows]
        for stream in [self.scheduler.submit(case.request) for case in widest]:
            for _ in stream:
                pass
        gc.collect()
        self.compiled.memory.limit = self.compiled.memory.used

    async def _send_all(self) -> None:
        clients = {asyncio.create_task(self._client(random.Random(self.chance.random()))) for _ in range(CLIENTS)}
        while clients and not self.count["hang"]:
            before = self.count.total()
            _, clients = await asyncio.wait(clients, timeout=PATIENCE)
            self.count["hang"] += self.count.total() == before
        for client in clients:
            client.cancel()

    async def _client(self, chance: random.Random) -> None:
        ways = [self._read] * 14 + [self._leave] * 3 + [self._kill] * 2 + [self._hurry] * 2 + [self._lose_loop]
        while self._sent < self._requests:
            self._sent += 1
            if not self._start and self._sent >= self._requests / 10:
                self._start = resident()
            await asyncio.sleep(chance.expovariate(50))
            await self._send(chance.choice(ways), chance.choice(self.cases), chance)

    async def _send(
        self, way: Callable[[Case, random.Random], Coroutine[Any, Any, None]], case: Case, chance: random.Random
    ) -> None:
        """Send one request; count what must not happen."""
        try:
            await way(case, chance)
        except lorac.OverBudget as error:
            self._held("refused: " + error.code, error.code == "queue_full")
            self._sent -= 1
            await asyncio.sleep(0.02)
        except lorac.AdapterNotFound:
            self._held("refused: adapter_not_found", case.changes)
        except Exception as error:
            kind = f"untyped {type(error).__name__}: {error}"[:300]
            if kind not in self.count:
                sys.excepthook(type(error), error, error.__traceback__)
            self.count[kind] += 1

    def _held(self, kind: str, right: bool, case: Case | None = None) -> None:
        self.count[kind] += 1
        if not right and case is not None:
            print(f"wrong {kind}: {case.request}", file=sys.stderr, flush=True)
        self.count[f"wrong {kind}"] += not right

    async def _read(self, case: Case, chance: random.Random) -> None:
        stream = self.scheduler.submit(case.request)
        tokens = [token.id async for token in stream]
        self._held("read", tokens in case.answers and stream.reason in {"stop", "length"}, case)

    async def _leave(self, case: Case, chance: random.Random) -> None:
        """Read a few tokens, and leave."""
        stream, tokens, most = self.scheduler.submit(case.request), list[int](), chance.randrange(1, 5)
        async with contextlib.aclosing(aiter(stream)) as reader:
            async for token in reader:
                tokens.append(token.id)
                if len(tokens) == most:
                    break
        self._held("left", case.begins_with(tokens), case)

    async def _kill(self, case: Case, chance: random.Random) -> None:
        """Be cancelled at any moment, even before the first token."""
        task = asyncio.create_task(self._read(case, chance))
        await asyncio.sleep(chance.expovariate(100))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self.count["killed"] += 1

    async def _hurry(self, case: Case, chance: random.Random) -> None:
        """Ask for an answer within some milliseconds."""
        stream = self.scheduler.submit(dataclasses.replace(case.request, deadline=chance.expovariate(50)))
        tokens = [token.id async for token in stream]
        whole = tokens in case.answers or stream.reason == "deadline"
        self._held("with a deadline", whole and case.begins_with(tokens), case)

    async def _lose_loop(self, case: Case, chance: random.Random) -> None:
        """Read a token in a thread whose event loop is closed then, as in a worker that crashes."""
        stream = self.scheduler.submit(case.request)
        tokens = await asyncio.to_thread(_read_one, stream)
        self._held("lost its loop", case.begins_with(tokens), case)

    # --- adapters ------------------------------------------------------------------------------------------------

    def _change(self, stop: threading.Event, chance: random.Random) -> None:
        """Unload adapters, and load them again with the values of either version."""
        while not stop.wait(chance.expovariate(20)):
            name = chance.choice(self.store.changing)
            try:
                self.compiled.remove_adapter(name)
                time.sleep(chance.expovariate(200))
                self.compiled.register(self.store.path(name, chance.randrange(2)))
                self.count["loaded again"] += 1
            except Exception as error:
                self.count[f"untyped {type(error).__name__}: {error}"[:300]] += 1

    # --- the end -------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        """See that nothing is left: no rows, and no bytes that do not go when memory is needed."""
        self.scheduler.close()
        self._held("rows left", self.scheduler.load == (0, 0))
        del self.scheduler
        gc.collect()
        with contextlib.suppress(lorac.OverBudget):
            self.compiled.memory.limit = self._before
        self._held("bytes left", self.compiled.memory.used == self._before)


def _read_one(stream: lorac.TokenStream) -> list[int]:
    """Return the first token, or none if there is none; the loop that reads is closed before the next."""

    async def first(reader: AsyncIterator[lorac.TextToken]) -> list[int]:
        token = await anext(reader, None)
        return [] if token is None else [token.id]

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)  # it complains of the reader that it leaves behind
    try:
        return loop.run_until_complete(first(aiter(stream)))
    finally:
        loop.close()


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────
def main(arguments: Sequence[str] | None = None, load: type[Load] = Load) -> None:
    """Run as the command line says; ends with 1 where something happened that must not."""
    parser = argparse.ArgumentParser(
        "python -m campaigns.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = [load(Store(Path(folder), given.adapters), given.rows, given.seed).run(given.requests)]
    print(report(found))
    if given.json:
        given.json.write_text(json.dumps({"seed": given.seed, "processes": found}, indent=1), encoding="utf-8")
    if bad := wrong(found):
        raise SystemExit(f"failed: {bad}")


if __name__ == "__main__":
    main()
