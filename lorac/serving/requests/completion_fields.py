"""The fields of a request that continues prompts."""

from collections.abc import Sequence
from typing import Annotated

import pydantic

from lorac.serving.requests.request_body import Items
from lorac.serving.requests.sampling_fields import SamplingFields

Ids = Annotated[Items[Annotated[int, pydantic.Field(ge=0, lt=1 << 63)]], pydantic.Field(min_length=1)]
USUAL_TOKENS = 16
"""The default of ``max_tokens``, as in OpenAI's API."""


def list_texts(given: str | Sequence[str | int | list[int]]) -> list[str | list[int]]:
    """Return a field's texts as a list; the field holds one text or several, each as text or token ids."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [[token for token in given if isinstance(token, int)]]
    return [one for one in given if not isinstance(one, int)]


class CompletionFields(SamplingFields):
    """The fields of a request that continues prompts.

    Attributes:
        prompt: one prompt or several, as text or token ids.
    """

    prompt: str | Ids | Annotated[Items[str] | Items[Ids], pydantic.Field(min_length=1, max_length=64)]
    logprobs: Annotated[int, pydantic.Field(ge=0, le=5)] | None = None

    @property
    def logprob_count(self) -> int | None:
        return self.logprobs

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens or USUAL_TOKENS

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, as text or token ids."""
        return list_texts(self.prompt)
