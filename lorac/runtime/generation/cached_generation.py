"""Generation over a target's cache: one run of some rows with one choice of adapters."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorac.errors import InputMismatch
from lorac.runtime.choice_states import ChoiceState
from lorac.runtime.generation.decoding_state import DecodingState
from lorac.runtime.generation.draft_model import DraftModel
from lorac.runtime.generation.driver import DecoderDriver, DecodingProgram, GenerationDriver
from lorac.runtime.generation.encoder_decoder_driver import driver_class
from lorac.runtime.generation.prompt_cache import CacheKey, PromptCache
from lorac.runtime.generation.prompts import Prompts
from lorac.runtime.generation.request import GenerateRequest
from lorac.runtime.traits import ModelTraits
from lorac.target.engine import BoundProgram, Engine
from lorac.target.kv_cache import KeyValueCache


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedGeneration:
    """One run of some rows over a cache.

    Attributes:
        engine, graph, traits: what runs.
        prompts: the rows; None where they begin with what begins every text of the model.
        asked, told: options and inputs; the second as transformers takes them.
        seeds: one for the run, or one for each row where tokens are drawn one after the other.
        prefixes: texts kept between calls, if any are.
    """

    engine: Engine
    graph: str
    traits: ModelTraits
    prompts: Prompts | None
    asked: GenerateRequest
    told: Mapping[str, Any]
    seeds: int | list[int] | None
    prefixes: PromptCache | None

    def __call__(self, bound: BoundProgram, state: ChoiceState, other: BoundProgram | None) -> Any:
        """What the rows go on with.

        Args:
            bound, state: the adapters.
            other: those that guess ahead, if any do.

        Raises:
            InputMismatch: ids that are none of the model's; a cache that does not hold the beginning of each row.
        """
        self._check_ids()
        generators = [torch.Generator().manual_seed(seed) for seed in self._each()]
        main = self._driver(bound, generators if self.asked.drawn else [])
        guess = None if other is None else self._driver(other, [])
        extra: dict[str, Any] = (
            {} if guess is None else {"assistant_model": DraftModel(guess, lambda work: work(guess))}
        )
        key: CacheKey = (self.graph, state.choice, state.versions.versions)
        if self.told.get("cache") is not None and self.prompts is not None:
            _check_cache(self.told["cache"], self.prompts, self.engine)
        elif self.prefixes is not None and self.prompts is not None:
            found = self.prefixes.found(self.engine, key, self.prompts.tokens())
            extra |= {} if found is None else {"cache": DecodingState(found)}
        with _seeded(None if self.asked.drawn else generators):
            answer = main.generate(**{**self.told, **extra})
        if main.text is not None and not isinstance(answer, torch.Tensor):
            self._note(main.text, answer)
        if self.prefixes is not None and main.text is not None:
            self._keep(self.prefixes, key, main.text.cache, answer)
        return answer

    def _each(self) -> list[int]:
        return [self.seeds] if isinstance(self.seeds, int) else self.seeds or []

    def _driver(self, bound: BoundProgram, generators: list[torch.Generator]) -> GenerationDriver:
        keeps = self.engine.cache_spec(self.graph)
        assert keeps is not None
        encode = functools.partial(bound.encode, self.graph) if keeps.encodes else None
        run = DecodingProgram(
            extend=functools.partial(bound.decode, self.graph),
            make=functools.partial(self.engine.new_cache, self.graph),
            keeps=keeps,
            encode=encode,
            generators=generators,
        )
        made = driver_class(self.traits.rules) if keeps.encodes else DecoderDriver
        return made(run, {**self.traits.settings, "vocab_size": keeps.vocabulary}, self.traits.generation or {})

    def _check_ids(self) -> None:
        """Raise ``InputMismatch`` where an id is none of the model's."""
        keeps = self.engine.cache_spec(self.graph)
        if self.prompts is None or keeps is None:
            return
        ids = self.prompts.ids
        for found in (int(ids.min()), int(ids.max())):
            if not 0 <= found < keeps.vocabulary:
                raise InputMismatch(
                    f"{'decoder_input_ids' if keeps.encodes else 'input_ids'} holds {found}, which is no token",
                    next_step=f"the model's go from 0 to {keeps.vocabulary - 1}",
                )

    def _note(self, text: DecodingState, answer: Any) -> None:
        """Have a cache that an answer brings say what it holds; of beams it has the rows as these were last."""
        text.engine = weakref.ref(self.engine)
        prompts = self.prompts if self.asked.beams == 1 else None
        text.rows = None if prompts is None else _cached_tokens(prompts, answer, text.cache, beams=1)

    def _keep(self, prefixes: PromptCache, key: CacheKey, cache: KeyValueCache, answer: Any) -> None:
        """Keep what a run left in its cache; in one of its own where the caller has that."""
        returned = self.told.get("cache") is not None or not isinstance(answer, torch.Tensor)
        held = cache.copy() if returned else cache
        assert self.prompts is not None
        prefixes.keep(self.engine, key, _cached_tokens(self.prompts, answer, held, beams=self.asked.beams), held)


@contextlib.contextmanager
def _seeded(generators: list[torch.Generator] | None) -> Iterator[None]:
    """Have torch's own random numbers, inside the block, come from a seed; they go on after it as if there was none."""
    if not generators:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generators[0].initial_seed())
        yield


def _check_cache(given: Any, prompts: Prompts, engine: Engine) -> None:
    """Raise ``InputMismatch`` where a cache that a call brings does not hold the beginning of each of its rows."""
    if not isinstance(given, DecodingState):
        raise InputMismatch(
            f"cache= is no cache of this model, but of the class {type(given).__name__}",
            next_step="give the cache of an answer of generate(return_dict_in_generate=True), or prefixes=",
        )
    held, counts = given.cache.lengths, prompts.counts
    if len(held) != len(counts) or any(length >= count for length, count in zip(held, counts, strict=True)):
        raise InputMismatch(
            f"the cache holds {_join_numbers(held)} tokens of its rows, and the prompts have {_join_numbers(counts)}",
            next_step="give the whole texts, each longer than what the cache holds of it",
        )
    if given.engine is not None and given.engine() is not engine:
        raise InputMismatch(
            "the cache holds what another model computed", next_step="go on with it by the model that answered with it"
        )
    pairs = zip(given.rows or (), prompts.tokens(), strict=False)
    other = next((row for row, (held, own) in enumerate(pairs) if not torch.equal(own[: len(held)], held)), None)
    if other is not None:
        raise InputMismatch(
            f"row {other} does not begin with what the cache holds of it",
            next_step="give the whole texts, as the answer has them",
        )


def _cached_tokens(prompts: Prompts, answer: Any, held: KeyValueCache, *, beams: int) -> list[torch.Tensor]:
    """The tokens of each row that a cache holds after a run; of beams, which it has as they were last, the prompts."""
    sequences = answer if isinstance(answer, torch.Tensor) else answer["sequences"]
    if beams > 1:
        held.select(range(0, len(held.lengths), beams))
        held.crop(prompts.counts)
    rows = prompts.tokens(None if beams > 1 else sequences)
    return [row[:length] for row, length in zip(rows, held.lengths, strict=True)]


def _join_numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
