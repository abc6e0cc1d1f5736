"""Embeddings, and the outputs of any model, in rows of many requests."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy
import openai
import pytest
import torch
from torch.nn import functional

from lorac.serving.row_batches import RowBatches
from tests.decoders import VOCABULARY
from tests.limits import ROWS
from tests.refusing import refuses
from tests.serving.models import make_app, make_encoder, serve, wait_until

TEXTS = ["First", "a second one", "x"]


@pytest.fixture(scope="module")
def encoder() -> Any:
    return make_encoder()


@pytest.fixture(scope="module")
def address(encoder: Any) -> Iterator[str]:
    with serve(make_app(encoder)) as url:
        yield url


def embedded(encoder: Any, text: str, choice: Any) -> torch.Tensor:
    inputs = {
        name: torch.tensor([value]) for name, value in encoder.tokenizer(text).items() if name != "token_type_ids"
    }
    return functional.normalize(encoder(**inputs, adapters=choice).last_hidden_state.mean(1)[0], dim=-1)


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_are_the_models(encoder: Any, address: str, form: Any) -> None:
    choices: list[Any] = ["one", None, {"two": 0.5}]
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        found = client.embeddings.create(
            model="base", input=TEXTS, encoding_format=form, extra_body={"adapters": choices}
        )
        plain = client.embeddings.create(model="one", input=TEXTS[0])
    vectors = [one.embedding for one in found.data]
    if form == "base64":
        vectors = [numpy.frombuffer(base64.b64decode(one), "<f4").tolist() for one in vectors]  # type: ignore[arg-type]
    for text, choice, vector in zip(TEXTS, choices, vectors, strict=True):
        expected = embedded(encoder, text, choice)
        assert (torch.tensor(vector) - expected).abs().max() <= ROWS[torch.float32] * expected.abs().max()
    assert (torch.tensor(plain.data[0].embedding) - torch.tensor(vectors[0])).abs().max() <= ROWS[torch.float32]
    assert found.usage.prompt_tokens == sum(map(len, TEXTS))


def test_predictions_as_json_and_as_npz(encoder: Any, address: str) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 5))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = encoder(**inputs, adapters=["one", "one"]).last_hidden_state
    with httpx2.Client(base_url=address) as http:
        fields = {"model": "one", "inputs": {name: value.tolist() for name, value in inputs.items()}}
        as_json = http.post("/v1/predict", json=fields).json()
        file = io.BytesIO()
        numpy.savez(file, **{name: value.numpy() for name, value in inputs.items()})
        headers = {"content-type": "application/x-npz"}
        as_npz = http.post("/v1/predict?model=one", content=file.getvalue(), headers=headers)
    assert torch.equal(torch.tensor(as_json["outputs"]["last_hidden_state"]), expected)
    assert torch.equal(torch.from_numpy(numpy.load(io.BytesIO(as_npz.content))["last_hidden_state"]), expected)


def test_requests_that_wait_share_a_call(encoder: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    asked: list[int] = []
    call, compute = type(encoder).__call__, RowBatches.compute

    def counted(compiled: Any, *args: Any, **inputs: Any) -> Any:
        counts.append(len(inputs["input_ids"]))
        wait_until(lambda: len(asked) == 12)  # else a quick call ends before the next request has come
        return call(compiled, *args, **inputs)

    async def computed(batches: RowBatches, *args: Any) -> Any:
        asked.append(1)
        return await compute(batches, *args)

    monkeypatch.setattr(type(encoder), "__call__", counted)
    monkeypatch.setattr(RowBatches, "compute", computed)

    async def ask() -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=address) as http:
            fields = [{"model": ["one", "two"][i % 2], "input": f"text{i % 10}"} for i in range(12)]
            return await asyncio.gather(*(http.post("/v1/embeddings", json=one) for one in fields))

    answers = asyncio.run(ask())
    assert {answer.status_code for answer in answers} == {200}
    assert sum(counts) == 12 and len(counts) <= 3
    expected = embedded(encoder, "text0", "one")
    vector = torch.tensor(answers[0].json()["data"][0]["embedding"])
    assert (vector - expected).abs().max() <= ROWS[torch.float32] * expected.abs().max()


def test_a_rejected_prediction_leaves_nothing_without_the_collector(address: str) -> None:
    gc.collect()
    gc.disable()
    try:
        for ids in ([[1]], [[97]]):
            httpx2.post(f"{address}/v1/predict", json={"model": "one", "inputs": {"ids": ids}})
        wait_until(lambda: not [found for found in gc.get_objects() if type(found).__name__ == "_RowJob"])
    finally:
        gc.enable()


def test_rejects_outputs_and_texts_beyond_their_limits(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorac.serving.row_endpoints.MOST_TOKENS", 10)
    ids = torch.ones(2, 5, dtype=torch.long).tolist()
    outputs = {"model": "one", "inputs": {"input_ids": ids, "attention_mask": ids}}
    with serve(make_app(encoder, max_output_bytes=1000)) as url:
        large = httpx2.post(f"{url}/v1/predict", json=outputs)
        few = httpx2.post(f"{url}/v1/embeddings", json={"model": "one", "input": ["x" * 5, "x"]})
        long = httpx2.post(f"{url}/v1/embeddings", json={"model": "one", "input": ["x" * 6, "x"]})
    assert (large.status_code, "give 1280 bytes" in large.text) == (400, True)
    assert (few.status_code, long.status_code, "2 texts of up to 6 tokens" in long.text) == (200, 400, True)


WRONG: list[tuple[str, dict[str, Any], int, str]] = [
    ("embeddings", {"model": "one"}, 400, "'input' is missing"),
    ("embeddings", {"model": "one", "input": ""}, 400, "'input' has 0 tokens"),
    ("embeddings", {"model": "one", "input": "x" * 25}, 400, "'input' has 25 tokens"),
    ("embeddings", {"model": "one", "input": [[97]]}, 400, "97"),
    ("embeddings", {"model": "one", "input": "x", "dimensions": 3}, 400, "'dimensions'"),
    ("embeddings", {"model": "one", "input": "x", "encoding_format": "hex"}, 400, "'encoding_format'"),
    ("embeddings", {"model": "three", "input": "x"}, 404, "'three'"),
    ("predict", {"model": "one", "inputs": {}}, 400, "'inputs'"),
    ("predict", {"model": "one", "inputs": {"input_ids": [[1, 2], [3]]}}, 400, "'inputs.input_ids'"),
    ("predict", {"model": "one", "inputs": {"input_ids": [["a"]]}}, 400, "'inputs.input_ids'"),
    ("predict", {"model": "one", "inputs": {"input_ids": [[1]], "attention_mask": [[1], [1]]}}, 400, "'inputs'"),
    ("predict", {"model": "one", "inputs": {"ids": [[1]]}}, 400, "ids"),
    ("predict", {"model": "one"}, 400, "'inputs' is missing"),
    ("predict", {"model": "one", "inputs": {"input_ids": [[10**30]]}}, 400, "'inputs.input_ids'"),
    ("predict", {"model": "one", "inputs": {"input_ids": [[1 << 63]]}}, 400, "input_ids"),
    ("predict", {"model": "one", "inputs": {"input_ids": [[[]]]}}, 400, "input_ids"),
    ("embeddings", {"model": "one", "input": [[1 << 63]]}, 400, "'input"),
    ("chat/completions", {"model": "one"}, 404, "path"),
]


@pytest.mark.parametrize(("path", "fields", "status", "sentence"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_requests(address: str, path: str, fields: dict[str, Any], status: int, sentence: str) -> None:
    with httpx2.Client(base_url=address) as http:
        answer = http.post(f"/v1/{path}", json=fields)
    assert (answer.status_code, sentence in answer.json()["error"]["message"]) == (status, True), answer.text


def test_rejects_bytes_that_are_not_an_npz(address: str) -> None:
    with httpx2.Client(base_url=address) as http:
        for content in (b"", b"PK\x03\x04", b"x" * 50):
            answer = http.post("/v1/predict", content=content, headers={"content-type": "application/x-npz"})
            assert (answer.status_code, "npz" in answer.json()["error"]["message"]) == (400, True)


def test_rows_of_tenants_take_turns(encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, order, call = threading.Event(), list[str](), RowBatches._call
    row = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2, dtype=torch.int64)}

    def gated(batches: RowBatches, jobs: Any) -> Any:
        assert opened.wait(60)
        order.extend(job.tenant for job in jobs)
        return call(batches, jobs)

    monkeypatch.setattr(RowBatches, "_call", gated)
    batches = RowBatches(encoder, 1, 2)

    async def run() -> None:
        tasks = list[asyncio.Task[Any]]()
        for tenant, waiting in (("alice", 0), ("alice", 1), ("alice", 2), ("bob", 3)):
            tasks.append(asyncio.create_task(batches.compute(row, ["one"], tenant)))
            await asyncio.sleep(0)
            await asyncio.to_thread(wait_until, lambda waiting=waiting: len(batches._jobs) == waiting)
        with refuses("queue_full"):
            await batches.compute(row, ["one"], "alice")
        opened.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    batches.close()
    assert order == ["alice", "bob", "alice", "alice"]
