from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import lorac
from tests.serving.models import make_app, make_tokenizer, serve


@pytest.fixture(scope="package")
def compiled(llama_folder: Path) -> Any:
    made = lorac.load(llama_folder)
    made.tokenizer = make_tokenizer()
    return made


@pytest.fixture(scope="package")
def url(compiled: Any) -> Iterator[str]:
    with serve(make_app(compiled)) as address:
        yield address


@pytest.fixture(scope="package")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made
