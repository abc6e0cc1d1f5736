"""Two workers on Ray answer as one model does, and as if they lived for ever."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
import urllib.request
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import openai
import psutil
import pytest
import torch
import transformers

import lorac
from lorac.testing import adapter_away
from tests.decoders import VOCABULARY
from tests.serving.models import make_tokenizer, settings

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [
    pytest.mark.slow,
    *map(
        pytest.mark.filterwarnings, ("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
    ),
]
T = TypeVar("T")
URL = "http://127.0.0.1:8123"
PROMPTS = ("Say", "Once upon a time", "one two three", "x")
CHOICES: dict[str, Any] = {"base": None, "one": "one", "two": "two", "one:0.7+two:0.3": {"one": 0.7, "two": 0.3}}
TOKENS = 150


@pytest.fixture(scope="module")
def compiled() -> Any:
    """A decoder that takes some seconds for an answer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    host = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, VOCABULARY, (2, 5))
    variants = {"one": lorac.LoRA(r=3, targets="all-linear"), "two": lorac.DoRA(r=1, targets=["q_proj", "down_proj"])}
    adapters = [adapter_away(variant, host, ids, name=name, seed=1) for name, variant in variants.items()]
    made = lorac.compile(host, adapters, target="onnxruntime", active=None, cache=True, threads=1, self_test=False)
    made.tokenizer = make_tokenizer()
    return made


@pytest.fixture(scope="module")
def cluster(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from ray import serve

    from lorac.serving.ray import RayServer, build_server

    folder = tmp_path_factory.mktemp("ray") / "model"
    compiled.save(folder)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": 8123})
    limits = settings(rows=6, waiting=6, max_new_tokens=200)
    server = RayServer(folder=str(folder), settings=limits, workers=2, adapters_per_worker=4)
    serve.run(build_server(server))
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def client(cluster: None) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="any", max_retries=0, timeout=300)


def options(number: int) -> dict[str, Any]:
    return {"temperature": 0.0} if number % 2 else {"temperature": 0.9, "seed": number}


def expected(compiled: Any, prompt: str, model: str, number: int) -> str:
    given = options(number)
    drawn = {"do_sample": True, "temperature": 0.9, "top_k": 0, "top_p": 1.0, "seed": number}
    ids = torch.tensor([compiled.tokenizer(prompt)["input_ids"]])
    more = drawn if given["temperature"] else {"do_sample": False}
    found = compiled.generate(ids, adapters=CHOICES[model], max_new_tokens=TOKENS, **more)
    return str(compiled.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


async def read(client: openai.AsyncOpenAI, prompt: str, model: str, number: int, begun: list[int]) -> str:
    stream = await client.completions.create(
        model=model, prompt=prompt, max_tokens=TOKENS, stream=True, **options(number)
    )
    text = ""
    async for event in stream:
        begun.append(number)
        text += event.choices[0].text
    return text


def run(client: openai.AsyncOpenAI, work: Coroutine[Any, Any, T]) -> T:
    async def close_after() -> T:
        async with client:
            return await work

    return asyncio.run(close_after())


def workers() -> list[psutil.Process]:
    processes = psutil.Process().children(recursive=True)
    return [each for each in processes if each.cmdline()[:1] and "ServeReplica:default:Worker" in each.cmdline()[0]]


def count(name: str) -> list[float]:
    """The values of a metric, one for each replica."""
    port = ray.nodes()[0]["MetricsExportPort"]
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    return [float(found) for found in re.findall(rf"^ray_{name}(?:_total)?\{{[^}}]*Worker[^}}]*\}} (\S+)", text, re.M)]


def wait_for_count(name: str, least: float) -> float:
    until = time.monotonic() + 60
    while sum(count(name)) < least:
        assert time.monotonic() < until, f"{name}: {count(name)}"
        time.sleep(0.5)
    return sum(count(name))


def test_choices_stay_with_their_workers(client: openai.AsyncOpenAI) -> None:
    models = [f"one:{n / 10}+two:0.5" for n in range(1, 9)]

    async def ask(model: str) -> None:
        await client.completions.create(model=model, prompt="Say", max_tokens=2, temperature=0)

    async def work() -> int:
        for model in models:
            await ask(model)
        calls = "serve_multiplexed_get_model_requests_counter"
        before = await asyncio.to_thread(wait_for_count, calls, 8)
        loads = sum(count("serve_multiplexed_models_load_counter"))
        for model in models * 8:
            await ask(model)
        await asyncio.to_thread(wait_for_count, calls, before + 64)
        return int(sum(count("serve_multiplexed_models_load_counter")) - loads)

    assert run(client, work()) <= 64 * 0.05
    assert len(count("lorac_requests_running")) == 2, "each worker reports its load"


def test_a_worker_that_is_killed_is_not_noticed(compiled: Any, client: openai.AsyncOpenAI) -> None:
    asked = [(prompt, model) for prompt, model in itertools.product(PROMPTS, CHOICES)]
    asked += asked[:8]
    assert len(asked) == 24
    begun: list[int] = []

    async def work() -> list[str]:
        some = [asyncio.create_task(read(client, *each, n, begun)) for n, each in enumerate(asked[:10])]
        while len(set(begun)) < 4:
            await asyncio.sleep(0.01)
        assert not any(task.done() for task in some), [task for task in some if task.done()]
        max(workers(), key=lambda worker: sum(worker.cpu_times()[:2])).kill()
        first = await asyncio.gather(*some)
        rest = [read(client, *each, n, begun) for n, each in enumerate(asked[10:], 10)]
        return [*first, *await asyncio.gather(*rest[:7]), *await asyncio.gather(*rest[7:])]

    texts = run(client, work())
    right = [text == expected(compiled, *each, n) for n, (text, each) in enumerate(zip(texts, asked, strict=True))]
    assert sum(right) == 24, right


def test_too_many_requests_are_refused_and_the_others_answered(compiled: Any, client: openai.AsyncOpenAI) -> None:
    async def work() -> list[Any]:
        return await asyncio.gather(*(read(client, "Say", "one", 1, []) for _ in range(60)), return_exceptions=True)

    found = run(client, work())
    refused = [each for each in found if isinstance(each, openai.RateLimitError)]
    answers = {each for each in found if not isinstance(each, openai.RateLimitError)}
    assert refused and answers == {expected(compiled, "Say", "one", 1)}


def test_a_client_that_leaves_frees_its_row_and_wrong_requests_are_refused(client: openai.AsyncOpenAI) -> None:
    async def work() -> None:
        stream = await client.completions.create(model="one", prompt="Say", max_tokens=TOKENS, stream=True)
        await anext(aiter(stream))
        await stream.close()
        with pytest.raises(openai.NotFoundError, match="three"):
            await client.completions.create(model="three", prompt="Say")
        messages: list[Any] = [{"role": "user", "content": "Say"}]
        with pytest.raises(openai.BadRequestError, match="response_format"):
            await client.chat.completions.create(
                model="one", messages=messages, max_tokens=5, response_format={"type": "json_object"}
            )

    run(client, work())
    until = time.monotonic() + 30
    while b'"running":0,"waiting":0' not in (state := urllib.request.urlopen(f"{URL}/v1/status").read()):
        assert time.monotonic() < until, state
