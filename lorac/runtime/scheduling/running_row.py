"""A request in the running batch: its text, its adapters and its sampler."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorac.errors import AdapterError, drop_frames, list_some
from lorac.ir.calls.modalities import BLOCKS, leave_block
from lorac.ir.graph.attention_ops import encoder_output_name
from lorac.ir.slots.choice import UNSET, parse_choice
from lorac.ir.slots.prefix import check_ids
from lorac.runtime.generation.cached_generation import compute_features
from lorac.runtime.generation.prompt_cache import CacheKey, PromptCache
from lorac.runtime.generation.prompt_features import PromptFeatures
from lorac.runtime.generation.prompts import Prompts
from lorac.runtime.generation.row_sampler import RowSampler
from lorac.runtime.invocation import InvokedProgram, find_phases
from lorac.runtime.scheduling.token_stream import TextRequest, TextToken, TokenStream
from lorac.target.engine import BoundProgram
from lorac.target.kv_cache import KeyValueCache

if TYPE_CHECKING:
    from lorac.runtime.choice_states import ChoiceState
    from lorac.runtime.generation.generate import GeneratingModel


class RunningRow:
    """One request from its submission to its end.

    Args:
        model: the compiled model; its graph has a cache.
        request: the request; all of its options are checked here.
        graph: the graph that decodes.

    Attributes:
        stream: the tokens of the answer.
        text: the prompt and the answer so far (length,).
        is_read: whether the whole prompt was computed, and a token drawn.
        state, program: the choice for the next tokens, and the engine's program bound to it.
        key, limit: the key of the row in the prompt cache, and the number of first tokens to cache; None: all.
        is_kept: whether the prompt cache had all ``limit`` tokens when the row began.

    Raises:
        AdapterNotFound, ChoiceError: as for ``compiled.swap``.
        InputMismatch, OptionError, Unavailable: as for ``compiled.generate``.
    """

    state: ChoiceState
    program: BoundProgram
    key: CacheKey
    limit: int | None
    is_kept: bool

    def __init__(self, model: GeneratingModel, request: TextRequest, graph: str) -> None:
        active = model.switch.choice if request.adapters is UNSET else parse_choice(request.adapters, model.switch.pool)
        self.request, self.choice = request, dict(active) or None
        self.sampler = RowSampler(model, request.ids, request.seed, graph, request.drawn, **request.options)
        spec = model.engine.cache_spec(graph)
        assert spec is not None  # else the sampler would have refused
        prompt = request.ids[None, : len(request.ids) - request.drawn]
        self._prompts = Prompts(prompt, prompt, None, None)
        self._features = PromptFeatures.of(request.options, spec.reads, model.traits[graph], self._prompts)
        self._keyed: tuple[object, Tensor, Mapping[str, Tensor]] | None = None
        self.stream, self.text = TokenStream(request.deadline), request.ids
        self._fed = None if self._features is None else self._features.feed(self._prompts)[0]
        prompt = prompt if self._features is None else self._features.text(self._prompts)
        check_ids(self._behind(prompt[0]), spec.vocabulary, "the prompt")
        self._model, self._graph, self._held = model, graph, contextlib.ExitStack()
        self._error: Exception | None = None
        self.is_read = False

    def begin(self, prompts: PromptCache | None) -> KeyValueCache:
        """Hold the adapters; return a cache for the row, with the prefix of the prompt that the prompt cache has.

        Raises:
            OverBudget: the memory budget has no room for the row now.
        """
        with contextlib.ExitStack() as undo:
            held = undo.enter_context(self._model.switch.hold(self.choice))
            self.phases = find_phases(self._model.switch.states, held.state, self._prompts.ids[0])
            self.state, self.limit = self.phases[0].state, self.phases[1].start if len(self.phases) > 1 else None
            self.program = self.state.bound or held.program_of(self._model.engine)
            self.key = ((self._graph, self.request.tenant), self.state.choice, self.state.versions.versions)
            features = self._compute_features()
            begins = self.keyed if self.limit is None else self.keyed[: self.limit + 1]
            known = None if prompts is None else prompts.find(self._model.engine, self.key, [begins])
            if known is not None:
                known.grow(self.sampler.criteria.most)
            self.is_kept = self.limit == (0 if known is None else known.lengths[0])
            cache = known or self.program.new_cache(self._graph, 1, self.sampler.criteria.most)
            if features:
                cache.set_encoder_outputs(features)
            self._held = undo.pop_all()
        return cache

    def _compute_features(self) -> Mapping[str, Tensor]:
        """Return the features of the prompt's images or sounds, cached in case admission is tried again."""
        if self._features is None:
            return {}
        versions = self.state.versions.versions
        if self._keyed is None or self._keyed[0] != versions:
            states, engine = self._model.switch.states, self._model.engine
            bound = self.program if self.limit is None else InvokedProgram(engine, states, [self.state])
            found = compute_features(self._features, bound, self._graph)
            self._keyed = versions, self._features.key(self._prompts, found).ids[0], found
        return self._keyed[2]

    def _behind(self, prompt: Tensor | None) -> Tensor:
        """Return the text with the prompt's ids replaced by ``prompt``; None: unchanged."""
        return self.text if prompt is None else torch.cat([prompt, self.text[len(prompt) :]])

    @property
    def fed(self) -> Tensor:
        """The text as the program takes it."""
        return self._behind(self._fed)

    @property
    def keyed(self) -> Tensor:
        """The text as the prompt cache's key: digests of images or sounds replace placeholders."""
        return self._behind(None if self._keyed is None else self._keyed[1])

    def count_left(self, past: int) -> int:
        """Set the row's state for the token at ``past``; return the number of tokens from there on with that state."""
        while len(self.phases) > 1 and self.phases[1].start <= past:
            del self.phases[0]
            self.state = self.phases[0].state
            self.program = self.state.bound or self.program
        return (self.phases[1].start if len(self.phases) > 1 else len(self.text)) - past

    def leave_block(self, past: int, count: int) -> int:
        """Return ``count`` tokens from ``past`` on, or more, so that no block of tokens is divided."""
        blocks = None if self._keyed is None else self._keyed[2].get(encoder_output_name(BLOCKS))
        return count if blocks is None or not count else leave_block(blocks[0], past + count, ahead=True) - past

    def let_go(self) -> None:
        """Release the adapters."""
        self._held.close()

    def take(self, token: int, logits: Tensor, failed: Exception | None = None) -> str:
        """Add a token that was drawn from logits (vocabulary,); return why the text ends, or "".

        Args:
            failed: the error for which no token was drawn.
        """
        if math.isnan(logits[token]) or (failed is not None and not math.isfinite(logits.max())):
            names = list_some([name for name, _ in self.state.choice]) or "none"
            failed = AdapterError(
                f"the logits are NaN or infinite with these adapters: {names}",
                next_step="lower their strengths or train them again, as their values overflow in this model",
                code="non_finite",
            )
        if failed is not None:
            self._error = failed
            return "error"
        return self._guard(lambda: self._add(token, logits))

    def _guard(self, work: Callable[[], str]) -> str:
        """Call ``work``; return why the text ends, or "". An error of the row's own criteria ends this row alone."""
        try:
            return work()
        except Exception as error:
            self._error = error
            return "error"

    def _add(self, token: int, logits: Tensor) -> str:
        self.is_read, self.text = True, torch.cat([self.text, self.text.new_tensor([token])])
        self.stream.add(_describe_token(token, logits, self.request.logprobs))
        return self._find_end()

    def find_earlier_end(self) -> str:
        """Return why a continued text had ended before it came here, or ""."""
        return self._guard(self._find_end) if self.request.drawn and not self.is_read else ""

    def _find_end(self) -> str:
        if not self.sampler.ends(self.text):
            return ""
        return "length" if len(self.text) >= self.sampler.criteria.most else "stop"

    def end(self, reason: str, error: Exception | None = None) -> None:
        """End the request, and release its adapters."""
        self.let_go()
        error = error or self._error
        if error is not None:
            drop_frames(error)  # frames would keep caches alive as long as a client keeps the error
        self.stream.end(reason, error)


def _describe_token(token: int, logits: Tensor, logprobs: int | None) -> TextToken:
    if logprobs is None:
        return TextToken(token)
    chances = logits.float().log_softmax(-1)
    values, ids = chances.topk(logprobs)
    return TextToken(token, float(chances[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
