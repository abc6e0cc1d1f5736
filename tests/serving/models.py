"""A tiny decoder with two adapters and a tokenizer of characters, served in a thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import fastapi
import torch
import transformers
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import lorac
from lorac.serving import ServingSettings, build_app
from lorac.serving.draining import limit_connections
from lorac.testing import adapter_away
from tests.decoders import VOCABULARY

TEMPLATE = "{% for turn in messages %}{{ turn['role'][0] }}{{ turn['content'] }};{% endfor %}"


def make_tokenizer() -> Any:
    """A token for each printable character but one: the model has no more."""
    characters = ["Ġ", *map(chr, range(33, 126))]
    vocabulary = {name: place for place, name in enumerate(["<pad>", "<s>", "</s>", *characters])}
    assert len(vocabulary) == VOCABULARY
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_encoder() -> Any:
    """An encoder with two adapters."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=24,
    )  # fmt: skip
    host = transformers.BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(3, VOCABULARY, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    adapters = [
        adapter_away(lorac.LoRA(r=2, targets=["query", "value"]), host, ids, name=name, seed=seed)
        for seed, name in enumerate(["one", "two"])
    ]
    compiled = lorac.compile(host, adapters, target="onnxruntime", active=None, example_inputs=inputs, self_test=False)
    compiled.tokenizer = make_tokenizer()
    return compiled


@contextlib.contextmanager
def serve(app: fastapi.FastAPI, make: Callable[[uvicorn.Config], uvicorn.Server] = uvicorn.Server) -> Iterator[str]:
    """Run an app for a block; its address."""
    server = make(uvicorn.Config(app, port=0, http="h11", log_level="error", lifespan="on"))
    limit_connections(server, app.state.settings.header_timeout, app.state.settings.max_connections)
    started, startup = threading.Event(), server.startup

    async def announce(*given: Any, **more: Any) -> None:
        await startup(*given, **more)
        started.set()

    server.startup = announce  # type: ignore[method-assign]  # tells when it listens
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(60)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to hold")


def alone(compiled: Any, text: str, choice: Any = None, **options: Any) -> str:
    """What generate answers to a prompt by itself."""
    ids = torch.tensor([compiled.tokenizer(text)["input_ids"]])
    found = compiled.generate(ids, adapters=choice, **options)
    return str(compiled.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


def settings(**given: Any) -> ServingSettings:
    return ServingSettings(**{"max_new_tokens": 40, "chunk": 8, **given})


def make_app(compiled: Any, **given: Any) -> fastapi.FastAPI:
    return build_app(compiled, settings(**given))
