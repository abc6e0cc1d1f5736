"""Checking of requests for text, and their submission to a scheduler."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias, final

import numpy as np
import torch

from lorac.argument_types import Fields, JsonMapping
from lorac.errors import AdapterNotFound, InputMismatch
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.choice import ChoiceSpec, parse_choice
from lorac.ir.slots.prefix import IDS, MASK
from lorac.runtime.scheduling.token_stream import TextRequest
from lorac.serving.active_request import ActiveRequest
from lorac.serving.answers.answers import Answer, AnswerPart, read_answers
from lorac.serving.answers.chat_parsing import CallReader, ChatParser, find_response_template
from lorac.serving.metrics import ServerMetrics
from lorac.serving.refusals import RefusedField
from lorac.serving.requests.chat_fields import ChatFields, ChatMessage, TokenizeFields
from lorac.serving.requests.choices import read_choices
from lorac.serving.requests.grammar import Grammars
from lorac.serving.requests.sampling_fields import CompletionFields, CountPenalty, SamplingFields
from lorac.serving.served_model import AdapterSource, ServedModel, TextScheduler
from lorac.serving.settings import ServingSettings
from lorac.serving.tokenizer import find_tokenizer

SubmittedText: TypeAlias = tuple[ActiveRequest, AsyncGenerator[AnswerPart]]
"""A running request, and the parts of its answers as they come."""


@final
class TextService:
    """A service that checks requests for text, and submits them to a scheduler. Threads may share it.

    Args:
        compiled: the model.
        scheduler: computes the answers.
        source: finds adapters by name.
        settings: the limits of requests.
        metrics: lists and counts the requests.
    """

    def __init__(
        self,
        compiled: ServedModel,
        scheduler: TextScheduler,
        source: AdapterSource,
        settings: ServingSettings,
        metrics: ServerMetrics,
    ) -> None:
        self._compiled, self._scheduler, self._source = compiled, scheduler, source
        self._settings, self._metrics = settings, metrics
        self._tokenizer = find_tokenizer(compiled)
        spec = compiled.engine.cache_spec(scheduler.component)
        assert spec is not None  # the scheduler has checked it
        self._spec = spec
        traits = compiled.traits[MAIN_GRAPH]
        self._defaults: JsonMapping = traits.generation or {}
        model_type = str(getattr(traits.config, "model_type", ""))
        self._template = find_response_template(self._tokenizer, model_type)
        self._tokenizer("")  # sets padding and truncation: later calls change neither, so threads may share it

    def begin_chat(self, fields: ChatFields, tenant: str, images: Sequence[object] | None = None) -> SubmittedText:
        """Submit a chat request.

        Args:
            images: the images of its messages; None: the server reads text alone.

        Raises:
            RefusedField: the server or the model does not support a field.
            LoracError: as ``Scheduler.submit``.
        """
        fields.check()
        if isinstance(fields.adapters, list):
            raise RefusedField("adapters", "is a list, and a chat has one choice", next_step="give a name or an object")
        tools = fields.offered_tools
        if tools and self._template is None and not fields.forced_tools:
            raise RefusedField("tools", "are not supported: the model's tokenizer has no response template")
        ids, inputs = self._encode_chat(fields.messages, images, tools)

        def new_parser() -> ChatParser | CallReader | None:
            if fields.forced_tools or self._template is None:
                return CallReader() if fields.forced_tools else None
            return ChatParser(self._tokenizer, self._template, self._tokenizer.decode(ids), tools)

        return self._submit(fields, tenant, [ids], new_parser, inputs)

    def begin_completion(self, fields: CompletionFields, tenant: str) -> SubmittedText:
        """Submit a request that continues prompts; raises as ``begin_chat``."""
        fields.check()
        prompts = [self._encode(prompt) for prompt in fields.prompts]
        return self._submit(fields, tenant, prompts, lambda: None)

    def tokenize(self, fields: TokenizeFields, images: Sequence[object] | None = None) -> dict[str, object]:
        """Return the tokens of a prompt or of a conversation with its images, in vLLM's form.

        Raises:
            RefusedField: the request has neither a prompt nor a conversation, or both.
        """
        if (fields.prompt is None) == (fields.messages is None):
            raise RefusedField("prompt", "or 'messages' is needed, and not both")
        messages, text = fields.messages, fields.prompt or ""
        ids = self._encode(text) if messages is None else self._encode_chat(messages, images)[0]
        return {"count": len(ids), "max_model_len": self._spec.limit, "tokens": ids}

    def _submit(
        self,
        fields: SamplingFields,
        tenant: str,
        prompts: Sequence[Sequence[int]],
        new_parser: Callable[[], ChatParser | CallReader | None],
        inputs: Fields = MappingProxyType({}),
    ) -> SubmittedText:
        """Submit a request for each answer to each prompt: all of them, or none.

        Args:
            new_parser: makes the parser of an answer.
            inputs: further inputs of the model, for the prompts' images.
        """
        base_name = self._settings.base_name
        choices = read_choices(self._source, tenant, base_name, fields.model, fields.adapters, len(prompts))
        rows = [(ids, choice, i) for ids, choice in zip(prompts, choices, strict=True) for i in range(fields.n)]
        requests = [self._request(fields, tenant, inputs, *row) for row in rows]
        try:
            names = {name for choice in choices for name, _ in parse_choice(choice, self._compiled.pool)}
            streams = self._scheduler.submit_all(requests)
        except AdapterNotFound as error:  # its message may name adapters of other tenants
            raise AdapterNotFound(
                "an adapter of the request was unloaded meanwhile", next_step="load it again, or list those there are"
            ) from error
        answers = [Answer(stream, self._tokenizer, fields.stops, new_parser()) for stream in streams]
        prompt_tokens = sum(map(len, prompts))
        request = ActiveRequest(
            tenant, fields.model, tuple(sorted(names)), prompt_tokens, answers=len(rows), user=fields.user
        )
        parts = read_answers(request, answers, self._metrics, has_logprobs=fields.logprob_count is not None)
        return request, parts

    def _request(
        self, fields: SamplingFields, tenant: str, inputs: Fields, ids: Sequence[int], choice: ChoiceSpec, i: int
    ) -> TextRequest:
        options = fields.options(self._defaults, self._spec.vocabulary)
        options["max_new_tokens"] = self._new_tokens(fields.new_tokens, len(ids))
        processors: list[object] = []
        if fields.presence_penalty or fields.frequency_penalty:
            processors.append(CountPenalty(len(ids), fields.presence_penalty, fields.frequency_penalty))
        if fields.answer_schema is not None:
            field, schema = fields.answer_schema
            processors.append(self._grammars.processor(schema, len(ids), field))
        more = {"logits_processor": processors} if processors else {}
        return TextRequest(
            torch.from_numpy(np.array(ids, dtype=np.int64)),  # torch.tensor holds the interpreter seven times as long
            choice,
            seed=None if fields.seed is None else fields.seed + i,
            logprobs=fields.logprob_count,
            tenant=tenant,
            deadline=self._settings.deadline,
            options={**inputs, **options, **more},
        )

    def _new_tokens(self, wanted: int | None, prompt: int) -> int:
        """Return the most tokens of an answer."""
        left, most = self._spec.after(prompt), self._settings.max_new_tokens
        if left is not None and left < (wanted or 1):
            raise InputMismatch(
                f"the prompt has {prompt} tokens and the model positions for {max(left, 0)} more"
                + (f", and 'max_tokens' is {wanted}" if wanted else ""),
                next_step="shorten the prompt, or ask for fewer tokens",
            )
        if wanted is not None and wanted > most:
            raise RefusedField("max_tokens", f"is {wanted}, and this server gives {most} at most")
        return wanted or min(most, left or most)

    @functools.cached_property
    def _grammars(self) -> Grammars:
        return Grammars.of(self._compiled)

    def _encode_chat(
        self, messages: Sequence[ChatMessage], images: Sequence[object] | None, tools: Sequence[JsonMapping] = ()
    ) -> tuple[Sequence[int], Fields]:
        """Return the tokens of a conversation, and the model's further inputs for its images."""
        shown = None if images is None else iter(images)
        turns = [message.for_template(shown) for message in messages]
        reader: Any = self._tokenizer if images is None else self._compiled.processor
        if not reader.chat_template:
            raise RefusedField("messages", "need a chat template, which the model's tokenizer lacks")
        options: dict[str, object] = {"tools": tools or None, "add_generation_prompt": True, "return_dict": True}
        options |= {} if images is None else {"tokenize": True, "return_tensors": "pt"}
        try:
            found = dict(reader.apply_chat_template(turns, **options))
        except Exception as error:  # a template is a program of the model's author, and may raise anything
            reason = str(error).strip().partition("\n")[0]
            raise RefusedField("messages", f"do not fit the model's chat template: {reason}") from error
        ids = found.pop(IDS)
        if not images:
            return ids if images is None else ids[0].tolist(), {}
        del found[MASK]
        return ids[0].tolist(), found

    def _encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        ids = self._tokenizer(prompt)[IDS]
        if not ids:
            raise RefusedField("prompt", "is empty")
        return ids
