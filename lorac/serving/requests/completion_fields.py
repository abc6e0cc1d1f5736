"""The fields of a request that continues prompts."""

from typing import Annotated

import pydantic

from lorac.serving.requests.sampling_fields import SamplingFields

Ids = Annotated[list[Annotated[int, pydantic.Field(ge=0)]], pydantic.Field(min_length=1)]
USUAL_TOKENS = 16
"""The most tokens of an answer to a request that does not say, as OpenAI's."""


class CompletionFields(SamplingFields):
    """The fields of a request that continues prompts.

    Attributes:
        prompt: one or several, as text or token ids.
    """

    prompt: str | Ids | Annotated[list[str] | list[Ids], pydantic.Field(min_length=1, max_length=64)]
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
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]
