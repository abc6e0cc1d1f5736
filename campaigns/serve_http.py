"""Send the requests of ``campaigns.serve`` over HTTP, from clients that close their connections at any moment.

python -m campaigns.serve_http [--requests N] [--adapters N] [--rows N] [--seed N] [--json FILE]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import openai
import uvicorn

import lorac
from campaigns.serve import PATIENCE, VOCABULARY, Case, Load, Store, main
from lorac.serving import ServingSettings, build_app

PATH = "/completions"


class HttpLoad(Load):
    """Clients of a server, and whoever changes its adapters."""

    def __init__(self, store: Store, rows: int, seed: int) -> None:
        super().__init__(store, rows, seed)
        self.scheduler.close()
        self.compiled.tokenizer = self._tokenizer = _make_tokenizer()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Run a server in this process for the block."""
        app = build_app(self.compiled, ServingSettings(rows=self.rows, waiting=32, chunk=4, page=False))
        with _serving(app) as self._port:
            self.scheduler = app.state.scheduler
            yield
        # FastAPI's caches hold the app's functions, which hold its state.
        app.state.scheduler = app.state.text = app.state.metrics = None

    async def _send_all(self) -> None:
        address, limits = f"http://127.0.0.1:{self._port}/v1", {"timeout": PATIENCE, "max_retries": 0}
        async with openai.AsyncOpenAI(base_url=address, api_key="any", **limits) as self._openai:
            await super()._send_all()

    def _fields(self, case: Case) -> dict[str, Any]:
        options = case.request.options
        drawn = {"temperature": options["temperature"], "top_k": options["top_k"]} if options["do_sample"] else {}
        more = {"adapters": case.request.adapters, "max_tokens": options["max_new_tokens"], "seed": case.request.seed}
        return {"model": "base", "prompt": case.request.ids.tolist(), "temperature": 0, **drawn, **more}

    def _texts(self, case: Case) -> list[str]:
        return [self._tokenizer.decode(answer, skip_special_tokens=True) for answer in case.answers]

    async def _read(self, case: Case, chance: random.Random) -> None:
        if chance.random() < 0.5:
            with self._refused(case):
                answer = await self._openai.post(PATH, body=self._fields(case), cast_to=openai.types.Completion)
                self._held("read", answer.choices[0].text in self._texts(case), case)
        else:
            await self._read_stream(case, "read as a stream")

    async def _leave(self, case: Case, chance: random.Random) -> None:
        """Read a few events, and close the connection."""
        await self._read_stream(case, "left", chance.randrange(1, 5))

    async def _read_stream(self, case: Case, kind: str, most: int | None = None) -> None:
        """Read a stream to its end, or some events of it."""
        found = list[str]()
        with self._refused(case):
            async with await self._openai.post(
                PATH,
                body={**self._fields(case), "stream": True},
                cast_to=openai.types.Completion,
                stream=True,
                stream_cls=openai.AsyncStream[openai.types.Completion],
            ) as events:
                async for event in events:
                    found.append(event.choices[0].text)
                    if len(found) == most:
                        break
            whole = "".join(found)
            right = any(text == whole or (most and text.startswith(whole)) for text in self._texts(case))
            self._held(kind, right, case)

    @contextlib.contextmanager
    def _refused(self, case: Case) -> Iterator[None]:
        """Raise the errors that a scheduler raises in the place of a server's."""
        try:
            yield
        except openai.RateLimitError as error:
            raise lorac.OverBudget(str(error), next_step="wait", code=str(error.code)) from error
        except openai.APIError as error:
            if error.code != "adapter_not_found":
                raise
            raise lorac.AdapterNotFound(str(error)) from error

    async def _hurry(self, case: Case, chance: random.Random) -> None:
        """Wait for some milliseconds, and close the connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(chance.expovariate(50)):
                await self._read(case, chance)
        self.count["hurried"] += 1

    async def _lose_loop(self, case: Case, chance: random.Random) -> None:
        """Send half a request, or a whole one, and close the connection at once."""
        body = json.dumps({**self._fields(case), "stream": True}).encode()
        head = [
            f"POST /v1{PATH} HTTP/1.1",
            "Host: it",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write("\r\n".join([*head, "", ""]).encode() + body[: chance.choice([len(body), len(body) // 2])])
        await writer.drain()
        writer.transport.abort()
        self.count["hung up"] += 1


def _make_tokenizer() -> Any:
    """Return a tokenizer with a token for each of so many characters."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special: Sequence[str] = ("<pad>", "<s>", "</s>")
    characters = map(chr, range(ord("0"), ord("0") + VOCABULARY - len(special)))
    inner = Tokenizer(models.BPE({name: place for place, name in enumerate([*special, *characters])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )


@contextlib.contextmanager
def _serving(app: Any) -> Iterator[int]:
    """Run an app in a thread for the block; its port."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    main(load=HttpLoad)
