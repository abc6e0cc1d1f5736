from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import lorac
from tests.image_models import batch, made, make_processor
from tests.serving.models import make_app, make_tokenizer, serve


@pytest.fixture(scope="package")
def compiled(llama_folder: Path) -> Any:
    made = lorac.load(llama_folder)
    made.tokenizer = make_tokenizer()
    return made


@pytest.fixture(scope="package")
def images(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that reads images, as an artifact that was saved with its processor."""
    folder = tmp_path_factory.mktemp("images") / "saved"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "forward reads 'image_grid_thw' as numbers", lorac.LoracWarning)
        whole = lorac.compile(
            made("qwen2_5_vl"), target="onnxruntime", active=None, cache=True,
            example_inputs=batch("qwen2_5_vl", (3, 3), seed=7),
        )  # fmt: skip
    whole.save(folder, tokenizer=make_processor())
    return lorac.load(folder)


@pytest.fixture(scope="package")
def url(compiled: Any) -> Iterator[str]:
    with serve(make_app(compiled)) as address:
        yield address


@pytest.fixture(scope="package")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made
