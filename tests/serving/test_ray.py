"""Two workers on Ray answer as one model does, and as if they lived for ever."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
import urllib.request
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import openai
import psutil
import pytest
import torch
import transformers

import lorac
from lorac.testing import adapter_away
from tests.decoders import VOCABULARY
from tests.refusing import refuses
from tests.serving.models import alone, make_app, make_encoder, make_tokenizer, serve, settings

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
def host() -> Any:
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
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def compiled(host: Any) -> Any:
    ids = torch.randint(3, VOCABULARY, (2, 5))
    variants = {"one": lorac.LoRA(r=3, targets="all-linear"), "two": lorac.DoRA(r=1, targets=["q_proj", "down_proj"])}
    adapters = [adapter_away(variant, host, ids, name=name, seed=1) for name, variant in variants.items()]
    made = lorac.compile(host, adapters, target="onnxruntime", active=None, cache=True, threads=1, self_test=False)
    made.tokenizer = make_tokenizer()
    return made


@pytest.fixture(scope="module")
def folder(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray") / "model"
    compiled.save(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from ray import serve

    from lorac.serving.ray import RayServer, build_server

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": 8123})
    limits = settings(rows=6, waiting=6, max_new_tokens=200)
    store = str(tmp_path_factory.mktemp("store"))
    server = RayServer(folder=str(folder), settings=limits, workers=2, adapters_per_worker=4, store=store)
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


def wait_for_counts(name: str, values: list[float]) -> None:
    until = time.monotonic() + 60
    while sorted(count(name)) != values:
        assert time.monotonic() < until, f"{name}: {count(name)}"
        time.sleep(0.5)


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


def test_health_fails_while_no_worker_runs(cluster: None) -> None:
    def waits_for(status: int) -> bool:
        return any(httpx2.get(f"{URL}/health", timeout=60).status_code == status or time.sleep(0.1) for _ in range(600))

    assert waits_for(200)
    for worker in workers():
        worker.kill()
    assert waits_for(503)
    assert waits_for(200)


def test_rejects_only_surplus_requests(compiled: Any, client: openai.AsyncOpenAI) -> None:
    async def work() -> list[Any]:
        return await asyncio.gather(*(read(client, "Say", "one", 1, []) for _ in range(60)), return_exceptions=True)

    found = run(client, work())
    refused = [each for each in found if isinstance(each, openai.RateLimitError)]
    answers = {each for each in found if not isinstance(each, openai.RateLimitError)}
    assert refused and answers == {expected(compiled, "Say", "one", 1)}


def test_a_disconnected_client_frees_its_row_and_wrong_requests_are_rejected(client: openai.AsyncOpenAI) -> None:
    async def work() -> None:
        stream = await client.completions.create(model="one", prompt="Say", max_tokens=TOKENS, stream=True)
        await anext(aiter(stream))
        await stream.close()
        with pytest.raises(openai.NotFoundError, match="three"):
            await client.completions.create(model="three", prompt="Say")

    run(client, work())
    until = time.monotonic() + 30
    while b'"running":0,"waiting":0' not in (state := urllib.request.urlopen(f"{URL}/v1/status").read()):
        assert time.monotonic() < until, state


FORM: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "pet",
        "schema": {
            "type": "object",
            "properties": {"legs": {"type": "integer", "minimum": 0, "maximum": 8}, "kind": {"enum": ["cat", "ant"]}},
            "required": ["legs", "kind"],
            "additionalProperties": False,
        },
    },
}


def test_answers_follow_the_response_format(compiled: Any, client: openai.AsyncOpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Say"}]
    asked: dict[str, Any] = {"model": "one", "messages": messages, "n": 3, "max_tokens": 60, "response_format": FORM}
    drawn: dict[str, Any] = {**asked, "temperature": 0.9, "seed": 3, "presence_penalty": 0.5}
    found = run(client, client.chat.completions.create(**drawn))
    with (
        serve(make_app(compiled, max_new_tokens=60)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any") as one_server,
    ):
        expected = one_server.chat.completions.create(**drawn)
    texts = [choice.message.content for choice in found.choices]
    assert texts == [choice.message.content for choice in expected.choices]
    assert all(json.loads(str(text))["kind"] in {"cat", "ant"} for text in texts)


def test_uploads_and_unloads_reach_all_workers(
    host: Any, compiled: Any, client: openai.AsyncOpenAI, tmp_path: Path
) -> None:
    ids, path = torch.randint(3, VOCABULARY, (2, 5)), tmp_path / "mine.safetensors"
    mine = adapter_away(lorac.LoRA(r=1, targets=["q_proj", "down_proj"]), host, ids, name="mine", seed=7)
    lorac.save_adapter(mine, path, format="native", model=host)
    with httpx2.Client(base_url=URL, timeout=120) as http:
        files = [("files", (path.name, path.read_bytes()))]
        added = http.post("/v1/adapters", data={"name": "mine"}, files=files)
        assert added.status_code == 201, added.text
        wrong = http.post("/v1/adapters", data={"name": "more"}, files=[("files", (path.name, b"x"))])
        assert wrong.status_code == 400
        assert "mine" in {model["id"] for model in http.get("/v1/models").json()["data"]}
    strengths = [n / 10 for n in range(1, 9)]
    models = ["mine", *(f"mine:{strength}+one:0.5" for strength in strengths)]

    async def ask(model: str) -> str:
        answer = await client.completions.create(model=model, prompt="Say", max_tokens=9, temperature=0)
        return answer.choices[0].text

    async def work() -> list[str]:
        # One worker alone has no room in line for all of them at once.
        texts = [*await asyncio.gather(*map(ask, models[:5])), *await asyncio.gather(*map(ask, models[5:]))]
        await asyncio.to_thread(wait_for_counts, "lorac_adapters_registered", [3, 3])
        with httpx2.Client(base_url=URL) as http:
            assert http.delete("/v1/adapters/mine").status_code == 200
        with pytest.raises(openai.NotFoundError, match="mine"):
            await ask("mine")
        await asyncio.to_thread(wait_for_counts, "lorac_adapters_registered", [2, 2])
        return texts

    compiled.add_adapter(mine)
    choices: list[Any] = ["mine", *({"mine": strength, "one": 0.5} for strength in strengths)]
    greedy = {"max_new_tokens": 9, "do_sample": False}
    assert run(client, work()) == [alone(compiled, "Say", choice, **greedy) for choice in choices]
    compiled.remove_adapter("mine")


def test_an_encoder_embeds_and_predicts(cluster: None, tmp_path: Path) -> None:
    from ray import serve as ray_serve

    from lorac.serving.ray import RayServer, build_server

    encoder = make_encoder()
    encoder.save(tmp_path / "encoder")
    server = RayServer(
        folder=str(tmp_path / "encoder"), settings=settings(), workers=2, worker_options={"num_cpus": 0.5}
    )
    ray_serve.run(build_server(server), name="encoder", route_prefix="/encoder")
    embeds = {"model": "base", "input": ["hi", "Once upon a time", "x"], "adapters": [None, "one", {"one": 0.5}]}
    predicts = {"model": "one", "inputs": {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 1]]}}
    with serve(make_app(encoder)) as url, httpx2.Client(timeout=120) as http:
        for path, body in {"/v1/embeddings": embeds, "/v1/predict": predicts}.items():
            found, expected = (http.post(f"{base}{path}", json=body) for base in (f"{URL}/encoder", url))
            assert found.status_code == 200, found.text
            assert found.json() == expected.json()
        wrong = http.post(f"{URL}/encoder/v1/embeddings", json={**embeds, "adapters": None, "model": "three"})
        assert wrong.status_code == 404, wrong.text
    ray_serve.delete("encoder")


def test_a_worker_is_added_while_requests_wait(cluster: None, folder: Path, compiled: Any) -> None:
    from ray import serve as ray_serve

    from lorac.serving.ray import RayServer, build_server

    limits = settings(rows=1, waiting=8, max_new_tokens=200)
    server = RayServer(folder=str(folder), settings=limits, workers=(1, 2), worker_options={"num_cpus": 0.5})
    ray_serve.run(build_server(server), name="scaling", route_prefix="/scaling")

    def count_workers() -> int:
        states = ray_serve.status().applications["scaling"].deployments["Worker"].replica_states
        return int(states.get("RUNNING", 0))

    assert count_workers() == 1
    until = time.monotonic() + 600  # Ray decides after half a minute; the rest is a worker's start

    async def ask(client: openai.AsyncOpenAI, number: int) -> set[tuple[int, str]]:
        found = set()
        while count_workers() < 2:
            assert time.monotonic() < until
            found.add((number, await read(client, "Say", "one", number, [])))
        return found | {(number, await read(client, "Say", "one", number, []))}

    async def work(client: openai.AsyncOpenAI) -> set[tuple[int, str]]:
        return set().union(*await asyncio.gather(*(ask(client, number) for number in range(4))))

    client = openai.AsyncOpenAI(base_url=f"{URL}/scaling/v1", api_key="any", max_retries=0, timeout=300)
    assert run(client, work(client)) == {(number, expected(compiled, "Say", "one", number)) for number in range(4)}
    ray_serve.delete("scaling")


def test_rejects_a_store_with_several_fronts() -> None:
    from lorac.serving.ray import RayServer

    with refuses("option_error", match="one front"):
        RayServer(folder="f", store="s", fronts=2)
