"""The fields that requests for text share, their translation into options of ``generate``, and those of prompts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, TypeAlias

import pydantic
import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.errors import short
from lorac.serving.refusals import RefusedField
from lorac.serving.requests.request_body import Items, Name, drop_usual

Amount: TypeAlias = Annotated[int, pydantic.Field(ge=1)]
Penalty: TypeAlias = Annotated[float, pydantic.Field(ge=-2, le=2)]
MOST_CHOICES = 16
"""The most answers to a prompt."""
MOST_ROWS = 256
"""The most texts of a request for embeddings, and the most choices of adapters."""
_DIGITS = 20
_EXTENSIONS = ("min_p", "repetition_penalty")
"""Fields that OpenAI's API lacks; each is an option of ``generate``."""


class ActiveFields(pydantic.BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    """The strength and rank of an adapter, as in ``lorac.Active``."""

    strength: float = 1.0
    rank: Amount | None = None


Strengths: TypeAlias = Name | Annotated[dict[Name, float | ActiveFields], pydantic.Field(max_length=64)]
"""A choice of adapters: a name, or name -> strength."""
Choices: TypeAlias = Strengths | Annotated[Items[Strengths | None], pydantic.Field(max_length=MOST_ROWS)] | None
"""A choice of adapters for all prompts or rows, or one for each."""
ModelName: TypeAlias = Annotated[str, pydantic.Field(max_length=4096)]
"""An adapter, a mixture of several, or the base."""
UserName: TypeAlias = Annotated[str, pydantic.Field(max_length=512)]
StopText: TypeAlias = Annotated[str, pydantic.Field(max_length=1024)]


class StreamOptions(pydantic.BaseModel, extra="forbid", strict=True):
    """The options of a stream.

    Attributes:
        include_usage: send the token counts in a last event.
    """

    include_usage: bool = False


class SamplingFields(pydantic.BaseModel, ABC, extra="forbid", strict=True, allow_inf_nan=False):
    """The fields that requests for text share: OpenAI's, and some of vLLM's.

    Attributes:
        model: an adapter, a mixture ``a:0.7+b:0.3``, or the base.
        adapters: where ``model`` is the base: a choice as ``compiled.swap`` takes it, or a list with one per prompt.
        seed: the seed of a prompt's first answer; its answer i, from 0, has seed + i.
        user: the client's name for its user, which is logged.
        top_k: the number of likeliest tokens to draw from; 0 or -1: all tokens.
    """

    model: ModelName
    adapters: Choices = None
    max_tokens: Amount | None = None
    temperature: Annotated[float, pydantic.Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, pydantic.Field(gt=0, le=1)] | None = None
    n: Annotated[int, pydantic.Field(ge=1, le=MOST_CHOICES)] = 1
    seed: Annotated[int, pydantic.Field(ge=0, lt=1 << 63)] | None = None
    stop: StopText | Annotated[Items[StopText], pydantic.Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Annotated[float, pydantic.Field(ge=-100, le=100)]] = {}
    user: UserName = ""
    top_k: Annotated[int, pydantic.Field(ge=-1)] | None = None
    min_p: Annotated[float, pydantic.Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, pydantic.Field(gt=0)] | None = None

    drop_usual = pydantic.model_validator(mode="before")(drop_usual)

    @property
    @abstractmethod
    def logprob_count(self) -> int | None:
        """The number of likeliest tokens to report with each token; None: report no log-probabilities."""

    @property
    @abstractmethod
    def new_tokens(self) -> int | None:
        """The most tokens of an answer; None: the server's limit."""

    @property
    def answer_schema(self) -> tuple[str, JsonMapping] | None:
        """The name of the field that asks for answers in JSON, and their schema; None: any text."""
        return None

    @property
    def stops(self) -> list[str]:
        """The strings that end an answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def reports_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Check the fields together.

        Raises:
            RefusedField: two fields contradict each other, or a field has a value that is not supported.
        """
        if self.stream_options is not None and not self.stream:
            raise RefusedField("stream_options", "is for streams", next_step="give 'stream': true, or leave it out")
        if "" in self.stops:
            raise RefusedField("stop", "holds an empty string, which would end every answer")

    def options(self, defaults: JsonMapping, vocabulary: int) -> dict[str, object]:
        """Return options of ``generate``.

        Args:
            defaults: the model's generation configuration, for fields that the request leaves out.
            vocabulary: the number of tokens.

        Raises:
            RefusedField: a key of ``logit_bias`` is not a token.
        """
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
        found: dict[str, float] = {}
        for name, usual in sampling.items():
            given = getattr(self, name)
            found[name] = given if given is not None else defaults.get(name, usual)
        found["top_k"] = max(found["top_k"], 0)
        drawn = {"do_sample": True, **found} if found["temperature"] else {"do_sample": False}
        more = {name: getattr(self, name) for name in _EXTENSIONS if getattr(self, name) is not None}
        for token in self.logit_bias:
            if not (token.isascii() and token.isdecimal() and len(token) < _DIGITS and int(token) < vocabulary):
                what = f"has the key {short(token)}, which is not a token id"
                raise RefusedField("logit_bias", what, next_step=f"give ids from 0 to {vocabulary - 1}")
        biases = {(int(token),): bias for token, bias in self.logit_bias.items() if bias}
        return {**drawn, **more, **({"sequence_bias": biases} if biases else {})}


class CountPenalty:
    """A logits processor of OpenAI's penalties: it lowers the scores of tokens that the answer already has.

    Args:
        prompt: the number of tokens of the prompt, which do not count.
        presence: subtracted once from the score of each token in the answer.
        frequency: subtracted from a token's score for each time that the answer has it.
    """

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self._prompt, self._presence, self._frequency = prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the next tokens' scores (rows, vocabulary) for texts (rows, length), less the penalties."""
        answer = input_ids[:, self._prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, answer, torch.ones_like(answer, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


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
