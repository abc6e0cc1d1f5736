"""Measure what a tenant of a server notices of hostile ones, and how long the event loop pauses.

python -m campaigns.hostile [--requests N] [--seed N]

A server with a store of uploads runs in a process of its own, the hostile tenant in another. The victim sends one short
request after the other, alone and next to each attack: floods of requests, long stop strings, bodies that come slowly,
large uploads, connections without a request. Its 95th percentile may be twice that alone, and a pause of the loop 50 ms
or, on a busy machine, twice the longest alone; both are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2

KEYS = {"k-v": "victim", "k-h": "hostile"}
MOST_TIMES, MOST_PAUSE = 2.0, 0.05
"""The largest 95th percentile and pause of the loop, in those alone; the seconds of a pause that is right anyway."""
WORDS = 512
_PORT, _ATTACK = "PORT", "--attack"


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


def serve(folder: Path) -> None:
    """Serve a folder, print the port, and answer ``/loop`` with the longest pause of the event loop since the last."""
    import uvicorn

    import lorac
    from lorac.serving import ServingSettings, build_app
    from lorac.serving.connections import limit_connections
    from lorac.serving.store import AdapterStore

    settings = ServingSettings(keys=KEYS, rows=8, waiting=32, body_timeout=5, header_timeout=2, max_connections=256)
    compiled = lorac.load(folder / "model")
    with AdapterStore(compiled, folder / "store") as store:
        app, pauses = build_app(compiled, settings, store=store), [0.0]

        async def watch() -> None:
            while True:
                begun = time.perf_counter()
                await asyncio.sleep(0.005)
                pauses.append(time.perf_counter() - begun - 0.005)

        @app.get("/loop")
        async def loop() -> float:
            longest = max(pauses)
            pauses[:] = [0.0]
            return longest

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
    "long stops": (stop, 16),
    "slow bodies": (drip, 80),
    "large uploads": (upload, 10),
    "many connections": (connect, 600),
}
"""Name -> what each client does again and again, and how many there are."""


async def attack(name: str, port: int, seed: int) -> None:
    """Attack a server until the input ends; print how often, by status."""
    work, clients = ATTACKS[name]
    count, ended = Counter[int](), asyncio.Event()

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
        await asyncio.to_thread(sys.stdin.readline)
        ended.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    print(dict(sorted(count.items())), flush=True)


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


def measure(client: httpx2.Client, requests: int) -> tuple[float, float, int]:
    """Return the victim's 95th percentile, the loop's longest pause since, and how many requests were not answered."""
    client.get("/loop")
    seconds, failed = list[float](), 0
    for seed in range(requests):
        begun = time.perf_counter()
        failed += client.post("/v1/completions", json=_fields(seed=seed, max_tokens=12)).status_code != 200
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds)[int(0.95 * (requests - 1))], client.get("/loop").json(), failed


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the command line says; ends with 1 where the victim notices too much."""
    parser = argparse.ArgumentParser("python -m campaigns.hostile", description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="of the victim, next to each attack")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(_ATTACK, nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.serve:
        serve(given.serve)
        return
    if given.attack:
        os.nice(10)  # hostile tenants have machines of their own
        asyncio.run(attack(given.attack[0], int(given.attack[1]), given.seed))
        return
    bad = list[str]()
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder) / "model")
        with _started("--serve", folder) as server:
            assert server.stdout is not None
            port = int(server.stdout.readline().removeprefix(_PORT))
            head = {"authorization": "Bearer k-v"}
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers=head, timeout=300) as client:
                measure(client, 20)
                print("next to               alone       95 %  times  pause; not answered; the hostile's answers")
                for name in ATTACKS:
                    alone, usual, _ = measure(client, given.requests)  # each time: others may use the machine too
                    with _started(_ATTACK, name, port, "--seed", given.seed) as hostile:
                        time.sleep(5)
                        late, pause, failed = measure(client, given.requests)
                        told, _ = hostile.communicate("\n", 120)
                    times = late / alone
                    row = f"{name:18} {alone * 1e3:5.0f} ms {late * 1e3:7.0f} ms {times:6.2f}"
                    print(f"{row} {usual * 1e3:3.0f} to {pause * 1e3:.0f} ms; {failed}; {told.strip()}", flush=True)
                    bad += [name] * (times > MOST_TIMES or pause > max(MOST_PAUSE, MOST_TIMES * usual) or failed > 0)
    if bad:
        raise SystemExit(f"failed: {', '.join(bad)}")


if __name__ == "__main__":
    main()
