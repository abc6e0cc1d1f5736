"""Protocols of the tokenizers that a server uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from lorac.argument_types import JsonMapping
from lorac.errors import Unavailable
from lorac.serving.served_model import ServedModel

if TYPE_CHECKING:
    import tokenizers


class ResponseParser(Protocol):
    """The part of transformers' parser of answers that the server uses."""

    def feed(self, text: str) -> list[JsonMapping]: ...

    def finalize(self) -> tuple[object, list[JsonMapping]]: ...


class FastTokenizer(Protocol):
    """The part of transformers' fast tokenizers that the server uses."""

    chat_template: str | None
    pad_token_id: int | None
    backend_tokenizer: tokenizers.Tokenizer

    def __call__(self, text: str) -> Mapping[str, list[int]]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def apply_chat_template(
        self,
        turns: Sequence[JsonMapping],
        *,
        tools: Sequence[JsonMapping] | None,
        add_generation_prompt: bool,
        return_dict: bool,
    ) -> Mapping[str, list[int]]: ...

    def get_response_parser(
        self, template: JsonMapping, *, prefix: str, tools: Sequence[JsonMapping] | None
    ) -> ResponseParser: ...


def find_tokenizer(compiled: ServedModel) -> FastTokenizer:
    """Return a model's tokenizer.

    Raises:
        Unavailable: the model has no tokenizer, or one that does not decode token by token.
    """
    tokenizer = compiled.tokenizer
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise Unavailable(
            "the model has no tokenizer of transformers' fast kind",
            next_step="give one: compiled.tokenizer = ..., or compiled.save(folder, tokenizer=...)",
        )
    return cast(FastTokenizer, tokenizer)
