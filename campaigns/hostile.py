"""Measure what a tenant of a server notices of hostile ones, and how long the event loop pauses.

python -m campaigns.hostile [--requests N] [--seed N] [--attack NAME]...

A server with a store of uploads runs in a process of its own, the hostile tenant in another. The victim sends one short
request after the other, alone and next to each attack in turn: floods of requests, long prompts, long stop strings,
long texts to tokenize, slow bodies, large uploads, connections without a request. Its 95th percentile may be twice that
alone, and the event loop's thread may compute for 50 ms between two looks at what waits. Both are printed, with the
longest time between two looks, which a busy machine makes longer, and the cores that the server and the hostile tenant
used. The hostile tenant's process has the lowest priority, since it would have a machine of its own. On a machine that
others use, ``--real-time`` measures as on an idle one: server and victim run before everything else (Linux, as root).
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import gc
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

KEYS = {"k-v": "victim", "k-h": "hostile"}
MOST_TIMES, MOST_PAUSE = 2.0, 0.05
"""The largest 95th percentile, in that alone; the most seconds that the loop's thread computes at a time."""
WORDS, _TURNS, _WAIT = 512, 4, 3
_PORT, _HOSTILE = "PORT", "--hostile"


# ── The server ───────────────────────────────────────────────────────────────────────────────────────────────────────
def make_folder(folder: Path) -> None:
    """Write a compiled model whose step takes longer than what the server itself computes."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    import lorac

    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 6}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=6, max_position_embeddings=512)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1")
    adapters = {"one": lorac.LoRA(r=4, targets=["q_proj"])}
    host, reserve = transformers.LlamaForCausalLM(config).eval(), lorac.Reserve(targets=["q_proj"], rank=4, adapters=4)
    made = lorac.compile(
        host, adapters, target="onnxruntime", active=None, cache=True, reserve=reserve, self_test=False, threads=1
    )
    made.save(folder, tokenizer=tokenizer)


def serve(folder: Path, *, first: bool = False) -> None:
    """Serve a folder and print the port; with ``first``, before all other programs.

    ``/loop`` answers with the event loop's longest time between two looks since it was last asked, in seconds of wall
    time and of processor time, without and for the garbage collector, and with the server's processor time.
    """
    import uvicorn

    import lorac
    from lorac.cli.serving import tune_process
    from lorac.serving import ServingSettings, build_app
    from lorac.serving.draining import limit_connections
    from lorac.serving.store import AdapterStore

    if first:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    settings = ServingSettings(keys=KEYS, rows=8, waiting=32, body_timeout=5, header_timeout=2, max_connections=256)
    compiled = lorac.load(folder / "model")
    with AdapterStore(compiled, folder / "store") as store:
        app = build_app(compiled, settings, store=store)
        waits, works, collected, main = [0.0], [0.0], [0.0, 0.0, 0.0], threading.get_ident()

        def note_collection(phase: str, _: object) -> None:
            if threading.get_ident() == main and phase == "start":
                collected[0] = time.thread_time()
            elif threading.get_ident() == main:
                spent = time.thread_time() - collected[0]
                collected[1:] = collected[1] + spent, max(collected[2], spent)

        gc.callbacks.append(note_collection)

        async def watch() -> None:
            while True:
                begun, used = time.perf_counter(), time.thread_time() - collected[1]
                await asyncio.sleep(0.005)
                waits[0] = max(waits[0], time.perf_counter() - begun - 0.005)
                works[0] = max(works[0], time.thread_time() - collected[1] - used)

        @app.get("/loop")
        async def loop() -> tuple[float, float, float, float]:
            found = waits[0], works[0], collected[2], time.process_time()
            waits[0] = works[0] = collected[2] = 0.0
            return found

        tune_process()
        server = uvicorn.Server(uvicorn.Config(app, port=0, http="h11", log_level="critical"))
        limit_connections(server, settings.header_timeout, settings.max_connections)

        async def run() -> None:
            task = asyncio.create_task(watch())
            serving = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            print(_PORT, server.servers[0].sockets[0].getsockname()[1], flush=True)
            await serving
            task.cancel()

        asyncio.run(run())


# ── The hostile tenant ───────────────────────────────────────────────────────────────────────────────────────────────
def _fields(**more: Any) -> dict[str, Any]:
    return {"model": "one", "prompt": "w5 w6 w7", "max_tokens": 24, "temperature": 1, **more}


async def _post(client: httpx2.AsyncClient, chance: random.Random, fields: dict[str, Any]) -> int:
    answer = await client.post("/v1/completions", json=fields)
    await asyncio.sleep(0.01 + 0.05 * (answer.status_code == 429) * chance.random())
    return answer.status_code


async def flood(client: httpx2.AsyncClient, chance: random.Random) -> int:
    """Ask for text, again as soon as it is refused."""
    return await _post(client, chance, _fields(n=chance.randrange(1, 4)))


async def prompt(client: httpx2.AsyncClient, chance: random.Random) -> int:
    """Ask for text behind prompts as long as the model takes."""
    words = " ".join(f"w{chance.randrange(WORDS)}" for _ in range(340))
    return await _post(client, chance, _fields(prompt=words))


async def text(client: httpx2.AsyncClient, chance: random.Random) -> int:
    """Send texts to be tokenized that are as long as bodies may be, and longer than the model takes."""
    words, path = "w5 " * 300_000, chance.choice(["/tokenize", "/v1/completions"])
    return (await client.post(path, json={"model": "one", "prompt": words})).status_code


async def stop(client: httpx2.AsyncClient, chance: random.Random) -> int:
    """Ask for text with stop strings as long as they may be, and longer."""
    length = chance.choice([1000, 4000, 200_000])
    return await _post(client, chance, _fields(stop=["w" * length, "u" * length], logprobs=5))


async def drip(client: httpx2.AsyncClient, chance: random.Random) -> int:
    """Send a body a byte at a time."""

    async def body() -> Any:
        while True:
            yield b" "
            await asyncio.sleep(0.1)

    return (await client.post("/v1/completions", content=body())).status_code


async def upload(client: httpx2.AsyncClient, chance: random.Random) -> int:
    """Upload megabytes that are no adapter, whole or in part."""
    size = chance.randrange(1, 32) << 20
    header = b'{"' + b"a" * 1000 + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(size)
    files = {"files": ("x.safetensors", data)}
    return (await client.post("/v1/adapters", data={"name": f"n{chance.randrange(99)}"}, files=files)).status_code


async def connect(client: httpx2.AsyncClient, chance: random.Random) -> int:
    """Hold a connection with half a request until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n")
    await reader.read()
    writer.close()
    return 0


ATTACKS: dict[str, tuple[Callable[[httpx2.AsyncClient, random.Random], Coroutine[Any, Any, int]], int]] = {
    "floods": (flood, 40),
    "long prompts": (prompt, 16),
    "long stops": (stop, 16),
    "long texts": (text, 8),
    "slow bodies": (drip, 80),
    "large uploads": (upload, 10),
    "many connections": (connect, 600),
}
"""Name -> what each client does again and again, and how many there are."""


async def attack(name: str, port: int, seed: int) -> None:
    """Print a line, and attack a server until the input ends; print how often, by status."""
    work, clients = ATTACKS[name]
    count, ended, begun = Counter[int](), asyncio.Event(), time.process_time()

    async def go_on(client: httpx2.AsyncClient, chance: random.Random) -> None:
        while not ended.is_set():
            try:
                count[await work(client, chance)] += 1
            except (httpx2.HTTPError, OSError):
                count[-1] += 1
                await asyncio.sleep(0.05)

    limits, head = httpx2.Limits(max_connections=None), {"authorization": "Bearer k-h"}
    async with httpx2.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", headers=head, timeout=60, limits=limits
    ) as client:
        tasks = [asyncio.create_task(go_on(client, random.Random(seed + number))) for number in range(clients)]
        print(flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        ended.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    print(time.process_time() - begun, dict(sorted(count.items())), flush=True)


# ── The victim ───────────────────────────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def _started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run this program with other arguments in a process for the block."""
    command = [sys.executable, "-m", "campaigns.hostile", *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


@dataclass
class Measured:
    """The victim's requests, alone or next to an attack.

    Attributes:
        seconds: of each.
        failed: how many were not answered.
        wait, work: the event loop's longest time between two looks, in seconds of wall time and of processor time.
        collection: the longest of Python's garbage collector in the loop's thread, which ``work`` leaves out.
        wall, server: seconds that passed, and those of processor time that the server took.
    """

    seconds: list[float] = field(default_factory=list)
    failed: int = 0
    wait: float = 0.0
    work: float = 0.0
    collection: float = 0.0
    wall: float = 0.0
    server: float = 0.0

    @property
    def late(self) -> float:
        """The 95th percentile."""
        return sorted(self.seconds)[int(0.95 * (len(self.seconds) - 1))]

    def measure(self, client: httpx2.Client, requests: int) -> None:
        """Send requests, one after the other."""
        first, started = client.get("/loop").json()[3], time.perf_counter()
        for seed in range(requests):
            begun = time.perf_counter()
            answer = client.post("/v1/completions", json=_fields(seed=seed, max_tokens=12))
            self.failed += answer.status_code != 200
            self.seconds.append(time.perf_counter() - begun)
        wait, work, collection, last = client.get("/loop").json()
        self.wait, self.work = max(self.wait, wait), max(self.work, work)
        self.collection, self.server = max(self.collection, collection), self.server + last - first
        self.wall += time.perf_counter() - started


def rest(client: httpx2.Client) -> None:
    """Wait until the server has nothing more to do."""
    used = -1.0
    while (now := client.get("/loop").json()[3]) - used > 0.05:
        used = now
        time.sleep(0.5)


def compare(client: httpx2.Client, name: str, requests: int, seed: int) -> bool:
    """Measure the victim alone and next to an attack, in turn; return whether it notices too much.

    In turn, since others may use the machine, too, now more and now less.
    """
    alone, beside, cpu, count = Measured(), Measured(), 0.0, Counter[int]()
    for turn in range(_TURNS):
        rest(client)
        alone.measure(client, requests // _TURNS)
        with _started(_HOSTILE, name, client.base_url.port, "--seed", seed + 1000 * turn) as hostile:
            assert hostile.stdout is not None
            hostile.stdout.readline()  # where others use the machine, its start may take a while
            time.sleep(_WAIT)
            beside.measure(client, requests // _TURNS)
            used, _, statuses = hostile.communicate("\n", 120)[0].partition(" ")
        cpu += float(used)
        count.update(ast.literal_eval(statuses))
    times = beside.late / alone.late
    row = f"{name:17}{alone.late * 1e3:6.0f} ms {beside.late * 1e3:6.0f} ms {times:6.2f}"
    loop = (
        f"{beside.work * 1e3:.0f}, {beside.collection * 1e3:.0f} ms ({alone.wait * 1e3:.0f} to {beside.wait * 1e3:.0f})"
    )
    cores = f"{beside.server / beside.wall:.2f}, {cpu / (beside.wall + _WAIT * _TURNS):.2f}"
    print(f"{row}  {loop}; {cores}; {beside.failed}; {dict(sorted(count.items()))}", flush=True)
    return times > MOST_TIMES or beside.work > MOST_PAUSE or beside.failed > 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the command line says; ends with 1 where the victim notices too much."""
    parser = argparse.ArgumentParser("python -m campaigns.hostile", description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="of the victim, next to each attack")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real-time", action="store_true", help="server and victim run before all other programs")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--attack", action="append", choices=ATTACKS, help="only this one; may be given several times")
    parser.add_argument(_HOSTILE, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        serve(given.serve, first=given.real_time)
        return
    if given.hostile:
        os.nice(19)  # hostile tenants have machines of their own
        asyncio.run(attack(given.hostile[0], int(given.hostile[1]), given.seed))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "model")
        with _started("--serve", folder, *["--real-time"] * given.real_time) as server:
            assert server.stdout is not None
            if given.real_time:  # the hostile tenant's process, a child, keeps the usual priority
                os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
            port = int(server.stdout.readline().removeprefix(_PORT))
            head = {"authorization": "Bearer k-v"}
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=head, timeout=300) as client:
                Measured().measure(client, 20)
                print(
                    "next to       95 % alone, with it, times; loop, collector (wall); cores of both; failed; statuses"
                )
                names = given.attack or ATTACKS
                bad = [name for name in names if compare(client, name, given.requests, given.seed)]
    if bad:
        raise SystemExit(f"failed: {', '.join(bad)}")


if __name__ == "__main__":
    main()
