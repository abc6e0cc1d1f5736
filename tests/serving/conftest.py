from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serving.models import make_app, make_compiled, serve


@pytest.fixture(scope="package")
def compiled() -> Any:
    return make_compiled()


@pytest.fixture(scope="package")
def url(compiled: Any) -> Iterator[str]:
    with serve(make_app(compiled)) as address:
        yield address


@pytest.fixture(scope="package")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made
