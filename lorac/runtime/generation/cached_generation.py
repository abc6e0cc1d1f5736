"""Generation over a target's key-value cache."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorac.errors import InputMismatch, Unavailable
from lorac.ir.calls.modalities import split_inputs
from lorac.ir.graph.attention_ops import DECODER_IDS
from lorac.ir.slots.prefix import IDS, check_ids
from lorac.runtime.choice_states import ChoiceState
from lorac.runtime.generation.decoding_state import DecodingState
from lorac.runtime.generation.driver import DecoderDriver, DecodingProgram, GenerationDriver
from lorac.runtime.generation.encoder_decoder_driver import driver_class
from lorac.runtime.generation.prompt_cache import CacheKey, PromptCache
from lorac.runtime.generation.prompt_features import PromptFeatures
from lorac.runtime.generation.prompts import Prompts
from lorac.runtime.generation.request import DraftModel, GenerateRequest
from lorac.runtime.invocation import InvokedProgram
from lorac.runtime.openmp import on_one_thread
from lorac.runtime.traits import ModelTraits
from lorac.target.engine import BoundProgram, Engine
from lorac.target.kv_cache import CacheSpec, KeyValueCache

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput

    Output = torch.Tensor | ModelOutput


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedGeneration:
    """A run of some rows of a ``generate`` call over a cache.

    Attributes:
        engine: runs the program.
        graph: the graph that decodes.
        cache_spec: the limits of the graph's cache.
        traits: the model's configuration.
        prompts: the rows' prompts; None where rows begin with the model's own start tokens.
        request: the options as the caller gave them.
        options: options and inputs as transformers takes them.
        seeds: one seed for the run, or one for each row where rows are sampled separately.
        prompt_cache: keys and values of earlier calls' sequences.
        row_states: the state of each row; empty: all rows have the call's.
        features: the images or sounds of the rows.
    """

    engine: Engine
    graph: str
    cache_spec: CacheSpec
    traits: ModelTraits
    prompts: Prompts | None
    request: GenerateRequest
    options: Mapping[str, object]
    seeds: int | list[int] | None
    prompt_cache: PromptCache | None
    row_states: Sequence[ChoiceState] = ()
    features: PromptFeatures | None = None

    def __call__(self, bound: BoundProgram, state: ChoiceState, draft: BoundProgram | None) -> Output:
        """Generate.

        Args:
            bound, state: the choice of adapters.
            draft: the choice that drafts tokens.

        Raises:
            InputMismatch: an id is outside the vocabulary, or the rows of ``cache=`` do not begin the prompts.
        """
        prompts, features = self.prompts, dict[str, Tensor]()
        if prompts is not None:
            text = prompts.ids if self.features is None else self.features.text(prompts)
            check_ids(text, self.cache_spec.vocabulary, DECODER_IDS if self.cache_spec.encodes else IDS)
        if self.features is not None and prompts is not None:
            features = compute_features(self.features, bound, self.graph)
            prompts = self.features.key(prompts, features)
        by_row = self.request.samples_rows
        seeds = [self.seeds] if isinstance(self.seeds, int) else self.seeds or []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        driver = self._make_driver(bound, generators if by_row else [], features)
        extra: dict[str, object] = {}
        if draft is not None:
            drafting = self._make_driver(draft, [])
            extra["assistant_model"] = DraftModel(drafting, lambda work: work(drafting), self.request)
        keyed: dict[CacheKey, list[int]] = {}
        limits: dict[int, int] = {}
        for row in range(0 if prompts is None else len(prompts.counts)):
            own = self.row_states[row] if self.row_states else state
            if isinstance(bound, InvokedProgram):
                (_, own), *later = bound.phases[row]
                if later:
                    limits[row] = later[0].start
            keyed.setdefault((self.graph, own.choice, own.versions.versions), []).append(row)
        if prompts is not None:
            cache = self.options.get("cache")
            if cache is not None:
                _check_cache(cache, prompts, self.engine)
            elif self.prompt_cache is not None:
                tokens = prompts.tokens()
                beginnings = [own[: limits.get(row, len(own)) + 1] for row, own in enumerate(tokens)]
                known = self._find(self.prompt_cache, keyed, beginnings, bound)
                extra |= {} if known is None else {"cache": DecodingState(known)}
                whole = [row for row, n in limits.items() if n == (0 if known is None else known.lengths[row])]
                keyed = {key: [row for row in rows if row not in whole] for key, rows in keyed.items()}
        with contextlib.ExitStack() as stack:
            stack.enter_context(on_one_thread())
            if generators and not by_row:
                stack.enter_context(torch.random.fork_rng(devices=[]))
                torch.manual_seed(generators[0].initial_seed())
            output: Output = driver.generate(**{**self.options, **extra})
        if driver.state is not None and not isinstance(output, torch.Tensor):
            driver.state.engine = weakref.ref(self.engine)
            if prompts is not None and self.request.beams == 1:  # with beams, the cache's last rows are no prompt's
                driver.state.rows = _cached_tokens(prompts, output, driver.state.cache, beams=1)
        if self.prompt_cache is not None and driver.state is not None:
            assert prompts is not None
            replace(self, prompts=prompts)._keep(self.prompt_cache, keyed, limits, driver.state.cache, output)
        return output

    def _make_driver(
        self, bound: BoundProgram, generators: list[torch.Generator], features: Mapping[str, Tensor] | None = None
    ) -> GenerationDriver:
        encodes = self.cache_spec.encodes
        program = DecodingProgram(
            decode=functools.partial(bound.decode, self.graph),
            new_cache=functools.partial(bound.new_cache, self.graph),
            cache_spec=self.cache_spec.behind(bound.virtual_tokens),
            encode=functools.partial(bound.encode, self.graph) if encodes else None,
            generators=generators,
            features=features,
            fed=self.features.feed(self.prompts) if self.features is not None and self.prompts is not None else (),
        )
        driver = driver_class(self.traits.rules) if encodes else DecoderDriver
        # Of the program, whatever a stored configuration says.
        settings = {**self.traits.settings, "vocab_size": self.cache_spec.vocabulary, "is_encoder_decoder": encodes}
        return driver(program, settings, self.traits.generation or {})

    def _find(
        self,
        prompt_cache: PromptCache,
        keyed: Mapping[CacheKey, Sequence[int]],
        tokens: Sequence[torch.Tensor],
        bound: BoundProgram,
    ) -> KeyValueCache | None:
        """Return a cache with those tokens of all rows that the prompt cache has; None if it has none."""
        found = {key: prompt_cache.find(self.engine, key, [tokens[row] for row in rows]) for key, rows in keyed.items()}
        if not any(found.values()):
            return None
        whole = self.engine.new_cache(self.graph, 0, 0)
        for key, rows in keyed.items():
            own = (self.row_states[rows[0]].bound if self.row_states else None) or bound
            whole.join(found[key] or own.new_cache(self.graph, len(rows), 0))
        order = [row for rows in keyed.values() for row in rows]
        whole.select([order.index(row) for row in range(len(order))])
        return whole

    def _keep(
        self,
        prompt_cache: PromptCache,
        keyed: Mapping[CacheKey, Sequence[int]],
        limits: Mapping[int, int],
        cache: KeyValueCache,
        output: Output,
    ) -> None:
        """Add the sequences of a run to the prompt cache; copy the key-value cache where the caller gets it too.

        Args:
            limits: row -> the number of its tokens before an adapter's invocation tokens.
        """
        assert self.prompts is not None
        beams = self.request.beams
        if not cache.is_croppable and (limits or beams > 1):
            return
        kept = range(0, len(cache.lengths), beams)
        shared = self.options.get("cache") is not None or not isinstance(output, torch.Tensor)
        own = cache.copy(kept) if shared or beams > 1 else cache
        tokens, copies = _cached_tokens(self.prompts, output, own, beams=beams), len(kept) // len(self.prompts.counts)
        if limits:
            own.crop([min(limits.get(place // copies, length), length) for place, length in enumerate(own.lengths)])
            tokens = [row[:length] for row, length in zip(tokens, own.lengths, strict=True)]
        for key, rows in keyed.items():
            places = [row * copies + copy for row in rows for copy in range(copies)]
            if places:
                part = own if len(keyed) == 1 and not limits else own.copy(places)
                prompt_cache.add(self.engine, key, [tokens[place] for place in places], part)


def compute_features(features: PromptFeatures, bound: BoundProgram, graph: str) -> dict[str, Tensor]:
    """Run the graph's tower on the rows' images or sounds; return the features as the decoder's inputs, by name.

    Raises:
        InputMismatch: the number of features differs from the number of placeholders.
        Unavailable: the adapters of the choice take no images or sounds.
    """
    if features.tables and (bound.virtual_tokens or isinstance(bound, InvokedProgram)):
        raise Unavailable(
            "virtual tokens and invoked adapters do not work with positions of several axes, or with tokens that see "
            "later ones",
            next_step="swap to another adapter, or give text alone",
        )
    runs = split_inputs(features.modality, features.inputs) if features.inputs else []
    return features.place([bound.compute_features(graph, run) for run in runs])


def _check_cache(cache: object, prompts: Prompts, engine: Engine) -> None:
    """Raise ``InputMismatch`` unless ``cache=`` is this model's and each of its rows begins the row's prompt."""
    if not isinstance(cache, DecodingState):
        raise InputMismatch(
            f"cache= takes a cache of this model, and this is a {type(cache).__name__}",
            next_step="give the cache of an answer of generate(return_dict_in_generate=True), or prompt_cache=",
        )
    lengths, counts = cache.cache.lengths, prompts.counts
    if len(lengths) != len(counts) or any(length >= count for length, count in zip(lengths, counts, strict=True)):
        raise InputMismatch(
            f"the cache holds {_join_numbers(lengths)} tokens of its rows, and the prompts have "
            f"{_join_numbers(counts)}",
            next_step="give the whole sequences, each longer than what the cache holds of it",
        )
    if cache.engine is not None and cache.engine() is not engine:
        raise InputMismatch("the cache belongs to another model", next_step="give it to the model that returned it")
    pairs = zip(cache.rows or (), prompts.tokens(), strict=False)
    other = next((i for i, (cached, row) in enumerate(pairs) if not torch.equal(row[: len(cached)], cached)), None)
    if other is not None:
        raise InputMismatch(
            f"row {other} does not begin with the tokens that the cache holds of it",
            next_step="give the whole sequences, as the answer has them",
        )


def _cached_tokens(prompts: Prompts, output: Output, cache: KeyValueCache, *, beams: int) -> list[torch.Tensor]:
    """Return the tokens of each row in a cache after a run; with beams, first crop the cache to the prompts."""
    sequences = output if isinstance(output, torch.Tensor) else output["sequences"]
    if beams > 1:
        cache.crop(prompts.counts)
    copies = sequences.shape[0] // prompts.ids.shape[0]
    whole = torch.cat([prompts.ids.repeat_interleave(copies, 0), sequences[:, prompts.ids.shape[1] :]], 1)
    rows = prompts.tokens(None if beams > 1 else whole)
    return [row[:length] for row, length in zip(rows, cache.lengths, strict=True)]


def _join_numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
