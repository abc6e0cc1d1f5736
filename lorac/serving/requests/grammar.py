"""Answers that must be JSON: scores of tokens that would break it are cut off."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from lorac.errors import MissingExtra
from lorac.serving.refusals import RefusedField
from lorac.serving.requests.chat_fields import ResponseFormat
from lorac.serving.tokenizer import FastTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher


@final
class Grammars:
    """Makes logits processors that keep answers to a form. Threads may share it.

    Args:
        tokenizer: of the model.
        vocabulary: number of logits.
        ends: tokens that end an answer.

    Raises:
        RefusedField: the tokenizer is of a kind that the grammar cannot read.
    """

    def __init__(self, tokenizer: FastTokenizer, vocabulary: int, ends: list[int]) -> None:
        try:
            import llguidance.hf
        except ModuleNotFoundError as error:
            raise MissingExtra("llguidance", "serve") from error
        try:
            self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=ends or None)  # type: ignore[arg-type]  # a part
        except ValueError as error:
            what = f"is not supported: the grammar cannot read the model's tokenizer ({error})"
            raise RefusedField("response_format", what) from error

    def processor(self, form: ResponseFormat, prompt: int) -> GrammarMask:
        """Return a logits processor for one answer.

        Args:
            form: JSON, of a schema or any object.
            prompt: tokens of the prompt.

        Raises:
            RefusedField: the schema is wrong, or asks for what the grammar cannot express.
        """
        from llguidance import LLMatcher

        schema = {"type": "object"} if form.json_schema is None else form.json_schema.schema_
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        except ValueError as error:
            raise RefusedField("response_format", f"has no usable schema: {error}") from error
        problem = LLMatcher.validate_grammar(grammar, self._tokens)
        if problem:
            raise RefusedField("response_format", f"has no usable schema: {problem}")
        return GrammarMask(LLMatcher(self._tokens, grammar, log_level=0), prompt)


@final
class GrammarMask:
    """A logits processor that admits the tokens with which one answer stays within a grammar.

    Args:
        matcher: follows the answer.
        prompt: tokens of the prompt.
    """

    def __init__(self, matcher: LLMatcher, prompt: int) -> None:
        self._matcher, self._seen = matcher, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (1, vocabulary) after the text (1, length)."""
        new = input_ids[0, self._seen :].tolist()
        self._seen += len(new)
        self._matcher.consume_tokens(new)
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        admitted = (bits[:, None] >> torch.arange(8)) & 1
        return scores.masked_fill(admitted.reshape(1, -1)[:, : scores.shape[1]] == 0, -torch.inf)
