"""Answers that must be JSON: the scores of tokens that would break the grammar become -inf."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.errors import translate_import_errors
from lorac.frontend.components import MAIN_GRAPH
from lorac.serving.refusals import RefusedField
from lorac.serving.served_model import ServedModel
from lorac.serving.tokenizer import FastTokenizer, find_tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher


@final
class Grammars:
    """A factory of logits processors that restrict answers to a JSON schema. Threads may share it.

    Args:
        tokenizer: the model's tokenizer.
        vocabulary: the number of logits.
        ends: tokens that end an answer.

    Raises:
        RefusedField: llguidance cannot read this kind of tokenizer.
    """

    def __init__(self, tokenizer: FastTokenizer, vocabulary: int, ends: list[int]) -> None:
        with translate_import_errors():
            import llguidance.hf
        try:
            self._tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=ends or None)  # type: ignore[arg-type]  # a part
        except ValueError as error:
            what = f"is not supported: the grammar cannot read the model's tokenizer ({error})"
            raise RefusedField("response_format", what) from error

    @classmethod
    def of(cls, model: ServedModel) -> Grammars:
        """Make the factory for a decoder's tokenizer; raises as the class."""
        spec = model.engine.cache_spec(MAIN_GRAPH)
        assert spec is not None  # its scheduler has checked it
        ends = (model.traits[MAIN_GRAPH].generation or {}).get("eos_token_id", [])
        return cls(find_tokenizer(model), spec.vocabulary, ends if isinstance(ends, list) else [ends])

    def processor(self, schema: JsonMapping, prompt: int, field: str = "response_format") -> GrammarMask:
        """Return a logits processor for one answer.

        Args:
            schema: the JSON schema of the answer.
            prompt: the number of tokens of the prompt.
            field: the field of the request that gives the schema.

        Raises:
            RefusedField: the schema is wrong, or has a part that the grammar cannot express.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
        except ValueError as error:
            raise RefusedField(field, f"has no usable schema: {error}") from error
        problem = LLMatcher.validate_grammar(grammar, self._tokens)
        if problem:
            raise RefusedField(field, f"has no usable schema: {problem}")
        mask = GrammarMask(grammar, prompt)
        self.bind(mask)
        return mask

    def bind(self, mask: GrammarMask) -> None:
        """Set the matcher of a mask, made with this factory's tokens."""
        from llguidance import LLMatcher

        mask.matcher = LLMatcher(self._tokens, mask.grammar, log_level=0)


@final
class GrammarMask:
    """A logits processor that admits only tokens that keep one answer within a grammar.

    Pickle it before its first token only. The matcher is not pickled; ``Grammars.bind`` gives it a new one.

    Args:
        grammar: the grammar in llguidance's text form.
        prompt: the number of tokens of the prompt.

    Attributes:
        matcher: llguidance's matcher, which has read the answer so far.
    """

    matcher: LLMatcher

    def __init__(self, grammar: str, prompt: int) -> None:
        self.grammar, self._seen = grammar, prompt

    def __reduce__(self) -> tuple[type[GrammarMask], tuple[str, int]]:
        return GrammarMask, (self.grammar, self._seen)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the next token's scores (1, vocabulary) after a text (1, length), with -inf for other tokens."""
        new = input_ids[0, self._seen :].tolist()
        self._seen += len(new)
        self.matcher.consume_tokens(new)
        bits = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        admitted = (bits[:, None] >> torch.arange(8)) & 1
        return scores.masked_fill(admitted.reshape(1, -1)[:, : scores.shape[1]] == 0, -torch.inf)
