"""``generate``: from what a call says to what it answers, on targets that keep a cache or run the host."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch

from lorac.argument_types import check_type
from lorac.errors import InputMismatch, MissingExtra, Unavailable, WrongType, short
from lorac.frontend.components import check_component, list_components
from lorac.ir.graph.attention_ops import DECODER_IDS
from lorac.ir.slots.choice import UNSET, parse_choice
from lorac.runtime.batching import batch_size, check_rows
from lorac.runtime.generation.eager_generation import EagerGeneration, refuse_prompt_cache
from lorac.runtime.generation.joining import RowJoiner, group_rows, select_rows
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.runtime.generation.prompts import CACHE, IDS, MASK, Prompts, main_input
from lorac.runtime.generation.request import GenerateRequest, translate_errors
from lorac.runtime.traits import ModelTraits

Seeds = int | list[int] | None
"""One for a run, or one for each row of it."""


def generate(
    compiled: Any, graph: str, told: Mapping[str, Any], *, adapters: Any, seed: Any, draft: Any, prefixes: Any
) -> Any:
    """Text that a compiled model goes on with; see ``Compiled.generate``.

    Args:
        compiled: the model.
        graph: which of several.
        told: inputs, and transformers' options.
        adapters, seed, draft, prefixes: as ``Compiled.generate``'s.
    """
    known = compiled.traits
    traits = known[check_component(graph, known)]
    host = _host_component(compiled, graph)
    if traits.generation is None and not callable(getattr(host, "generate", None)):
        raise Unavailable(
            "the model does not generate",
            next_step="transformers' models whose can_generate() is true do, such as those of AutoModelForCausalLM",
        )
    if traits.generation is not None:
        _require_transformers()
    if prefixes is not None:
        check_type(
            prefixes, PromptCache, "prefixes=", next_step="give a lorac.PromptCache(), the same one at each call"
        )
    call = (
        _GenerateCall.over(compiled, graph, traits, told)
        if host is None
        else _GenerateCall.by(host, compiled, graph, traits, told)
    )
    if draft is not UNSET:
        call = replace(call, asked=call.asked.guessing())
    with torch.no_grad():
        return call.answered(adapters, seed, draft, prefixes)


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401  (asked for, whether it is there)
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "hf") from error


@dataclass(frozen=True, eq=False, kw_only=True)
class _GenerateCall:
    """One call of ``generate``, whose options were checked.

    Attributes:
        compiled, graph, traits: of which model.
        asked: options and inputs, as transformers takes them.
        prompts: the rows; None of a host that begins with something else, and of a decoder that begins as ever.
        text: what their tokens and their mask are called.
        as_numpy: whether sequences are NumPy's.
    """

    compiled: Any
    graph: str
    traits: ModelTraits
    asked: GenerateRequest
    prompts: Prompts | None
    text: tuple[str, str] = (IDS, MASK)
    as_numpy: bool = False

    @classmethod
    def over(cls, compiled: Any, graph: str, traits: ModelTraits, given: Mapping[str, Any]) -> _GenerateCall:
        """A call that goes over a cache, checked."""
        keeps = compiled.engine.cache_spec(graph)
        if keeps is None:
            compiled.engine.refuse_cache()
        if keeps.encodes:
            return cls._behind(keeps.encodes, compiled, graph, traits, given)
        asked = GenerateRequest(_name_first_argument(given), traits.generation or {})
        asked.refuse_unknown((IDS, MASK, CACHE), hosted=False)
        asked.refuse_inner()
        asked.check_kinds()
        asked = asked.having(_tokenizer_option(compiled, asked))
        if IDS not in asked.told:
            raise _missing_prompt()
        prompts = Prompts.of(asked.told[IDS], asked.told.get(MASK), asked.pad, asked.ends)
        return cls(compiled=compiled, graph=graph, traits=traits, asked=asked, prompts=prompts)

    @classmethod
    def _behind(
        cls, encodes: Sequence[str], compiled: Any, graph: str, traits: ModelTraits, given: Mapping[str, Any]
    ) -> _GenerateCall:
        """A call that goes over a cache behind an encoder, checked."""
        main, text = main_input(encodes), (DECODER_IDS, f"decoder_{MASK}")
        told = _name_first_argument(given, main)
        as_numpy = isinstance(told.get(main), np.ndarray)
        told = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in told.items()}
        asked = GenerateRequest(told, traits.generation or {})
        asked.refuse_unknown((*encodes, *text, *_rules_options(traits)), hosted=False)
        asked.refuse_inner()
        asked.check_kinds()
        asked = asked.having(_tokenizer_option(compiled, asked))
        if main not in asked.told:
            raise InputMismatch("there is nothing to encode", next_step=f"give {main}=, such as a processor makes")
        rows = _count_rows(main, asked.told[main])
        ids, mask = (asked.told.get(name) for name in text)
        prompts = None if ids is None else Prompts.of(ids, mask, None, ())  # many a decoder begins with padding
        if prompts is not None and len(prompts.counts) != rows:
            raise InputMismatch(
                f"{main} has {rows} rows, and {text[0]} {len(prompts.counts)}", next_step="give one of each per row"
            )
        made = cls(compiled=compiled, graph=graph, traits=traits, asked=asked, prompts=prompts)
        return replace(made, text=text, as_numpy=as_numpy)

    @classmethod
    def by(cls, host: Any, compiled: Any, graph: str, traits: ModelTraits, given: Mapping[str, Any]) -> _GenerateCall:
        """A call of the host's own generation, checked as far as that is transformers'."""
        decodes = traits.generation is not None and not traits.settings.get("is_encoder_decoder")
        asked = GenerateRequest(_name_first_argument(given) if decodes else dict(given), traits.generation or {})
        if traits.generation is not None:
            asked.refuse_unknown(_host_options(host), hosted=True)
            asked.check_kinds()
            asked = asked.having(_tokenizer_option(compiled, asked))
        ids, prompts = asked.told.get(IDS), None
        if decodes and not any(isinstance(value, torch.Tensor | np.ndarray) for value in asked.told.values()):
            raise _missing_prompt()
        in_rows = not isinstance(ids, torch.Tensor) or ids.dim() <= 2  # several codes a token are the host's business
        if decodes and IDS in asked.told and in_rows:
            prompts = Prompts.of(ids, asked.told.get(MASK), asked.pad, asked.ends)
        return cls(compiled=compiled, graph=graph, traits=traits, asked=asked, prompts=prompts)

    def answered(self, adapters: Any, seed: Any, draft: Any, prefixes: Any) -> Any:
        """What the call answers: rows of one kind by one run each, put together in the order of the batch."""
        rows = batch_size((), self.asked.told)
        seeds, choices = _parse_seeds(seed, rows), self._choices(adapters, rows)
        split = isinstance(seeds, list) and not (self.asked.drawn and self._driven)
        groups = group_rows([(choices and choices[row], (split or self.asked.drafts) and row) for row in range(rows)])
        if len(groups) == 1:
            return self._as_given(
                self.run(adapters if choices is None else _choice_spec(choices[0]), seeds, draft, prefixes)
            )
        self._refuse_parts(groups)
        parts = []
        for group in groups:
            choice = adapters if choices is None else _choice_spec(choices[group[0]])
            own = [seeds[row] for row in group] if isinstance(seeds, list) else seeds
            parts.append(self._part(group, rows).run(choice, own, draft, prefixes))
        joined = RowJoiner(groups, self.asked.filler, self.asked.beams)
        return self._as_given(joined.whole(parts))

    @property
    def _driven(self) -> bool:
        return self.compiled.engine.module is None

    def _choices(self, adapters: Any, rows: int) -> list[Any] | None:
        """The choice of each row, in its canonical spelling; None where there is one for all."""
        if not isinstance(adapters, Sequence) or isinstance(adapters, str):
            return None
        check_rows((torch.empty(rows),), {}, adapters)
        return [parse_choice(choice, self.compiled.pool) for choice in adapters]

    def _refuse_parts(self, groups: Sequence[Sequence[int]]) -> None:
        """Raise ``Unavailable`` for what belongs to one run alone."""
        for name in ("streamer", CACHE):
            if self.asked.told.get(name) is not None:
                raise Unavailable(
                    f"{name}= is for one run, and these rows take {len(groups)}",
                    next_step="call once per choice of adapters, or leave it out",
                )

    def _part(self, rows: Sequence[int], total: int) -> _GenerateCall:
        asked = replace(self.asked, told=select_rows(self.asked.told, rows, total))
        prompts = None if self.prompts is None else self.prompts.rows(rows)
        return replace(self, asked=asked, prompts=prompts)

    def _as_given(self, answer: Any) -> Any:
        """Sequences as NumPy's where the ids were."""
        if not self.as_numpy and not isinstance(self.asked.told.get(IDS), np.ndarray):
            return answer
        if isinstance(answer, torch.Tensor):
            return answer.numpy()
        answer["sequences"] = answer["sequences"].numpy()
        return answer

    # --- one run ---------------------------------------------------------------------------------------------------

    def run(self, choice: Any, seeds: Seeds, draft: Any, prefixes: Any) -> Any:
        """Some rows with one choice of adapters, in one call (invariant 7)."""
        told, prompts = dict(self.asked.told), self.prompts
        if prompts is not None:
            prompts = prompts.trimmed() if self.asked.drafts else prompts
            told = {name: prompts.arranged(value) for name, value in told.items()}
            mask = torch.ones_like(prompts.ids) if prompts.mask is None else prompts.mask
            told |= dict(zip(self.text, (prompts.ids, mask), strict=True))
        if not self._driven:
            refuse_prompt_cache(prefixes, "the host's own generation keeps no prefixes")
            fitting = self.compiled.cast_inputs(told)
            hosted = EagerGeneration(graph=self.graph, told=fitting, seeds=seeds)
            answer = self._bound(choice, draft, hosted)
            return answer if prompts is None else _restore_prompts(prompts, answer)
        from lorac.runtime.generation.cached_generation import CachedGeneration

        if self.text[0] != IDS:
            refuse_prompt_cache(prefixes, "a text behind an encoder is no beginning of another")
        driven = CachedGeneration(
            engine=self.compiled.engine,
            graph=self.graph,
            traits=self.traits,
            prompts=prompts,
            asked=self.asked,
            told=told,
            seeds=seeds,
            prefixes=prefixes,
        )
        answer = self._bound(choice, draft, driven)
        return answer if prompts is None else _restore_prompts(prompts, answer)

    def _bound(self, choice: Any, draft: Any, work: Callable[..., Any]) -> Any:
        """Work done with a choice and, where one guesses ahead, with that choice too."""
        compiled = self.compiled
        if draft is UNSET:
            return compiled.with_choice(choice, lambda bound, state: translate_errors(lambda: work(bound, state, None)))
        if compiled.engine.fused:
            raise Unavailable(
                "weights hold one choice of adapters at a time, and a draft is a second",
                next_step="compile with mode='live', or leave draft= out",
            )
        return compiled.with_choice(
            draft,
            lambda other, _: compiled.with_choice(
                choice, lambda bound, state: translate_errors(lambda: work(bound, state, other))
            ),
        )


def _restore_prompts(prompts: Prompts, answer: Any) -> Any:
    """An answer with the prompts as they were given."""
    if isinstance(answer, torch.Tensor):
        return prompts.put_back(answer)
    answer["sequences"] = prompts.put_back(answer["sequences"])
    return answer


def _host_component(compiled: Any, graph: str) -> Any:
    """The host that runs; None where an emitted program does."""
    module = compiled.engine.module
    return None if module is None else list_components(module)[graph]


def _missing_prompt() -> InputMismatch:
    return InputMismatch("there is no prompt", next_step="give input_ids=, such as a tokenizer makes")


def _name_first_argument(given: Mapping[str, Any], main: str = IDS) -> dict[str, Any]:
    """What was given, with the first argument by its name.

    Raises:
        InputMismatch: it is given by its name, too.
    """
    if given.get("inputs") is not None and given.get(main) is not None:
        raise InputMismatch(f"{main}= is given twice: it is the first argument too", next_step="leave one of them out")
    return {main if name == "inputs" else name: value for name, value in given.items()}


def _host_options(host: Any) -> list[str]:
    """What the host's own generation takes as inputs."""
    taken = [
        *inspect.signature(host.forward).parameters,
        *inspect.signature(host.prepare_inputs_for_generation).parameters,
    ]
    own = inspect.signature(host.generate).parameters
    return [*taken, *own]


def _count_rows(name: str, value: Any) -> int:
    """How many rows there are to encode.

    Raises:
        WrongType: what was given is no batch.
        InputMismatch: it is empty.
    """
    if not isinstance(value, torch.Tensor) or value.dim() < _MIN_DIMS:
        raise WrongType(f"{name}= is no batch: {short(value)}", next_step="give a tensor with a row for each text")
    if not value.numel():
        raise InputMismatch(
            f"{name}= of {list(value.shape)} is empty", next_step="give one row or more, each with something"
        )
    return int(value.shape[0])


_MIN_DIMS = 2


def _rules_options(traits: ModelTraits) -> list[str]:
    """What the model's own way of generating takes, where it has one."""
    if traits.rules is None:
        return []
    from lorac.runtime.generation.encoder_decoder_driver import load_rules_class

    return [*inspect.signature(load_rules_class(traits.rules).generate).parameters]  # type: ignore[attr-defined]  # it has one


def _tokenizer_option(compiled: Any, asked: GenerateRequest) -> dict[str, Any]:
    """The tokenizer, where an option needs one that the call does not give."""
    own = asked.told.get("tokenizer")
    needed = bool(asked.option("stop_strings") or asked.option("token_healing"))
    found = compiled.tokenizer if own is None and needed else own
    asked.check_stops(found)
    return {} if found is None else {"tokenizer": found}


def _parse_seeds(seed: Any, rows: int) -> Seeds:
    """A seed for all rows, or one for each."""
    if seed is None or isinstance(seed, Integral):
        return None if seed is None else _parse_seed(seed)
    if not isinstance(seed, Sequence) or not all(isinstance(one, Integral) for one in seed):
        raise WrongType(f"seed= is {short(seed)}", next_step="give a whole number, or one per row")
    if len(seed) != rows:
        raise InputMismatch(f"{len(seed)} seeds for {rows} rows", next_step="give one per row, or one for all")
    return [_parse_seed(one) for one in seed]


def _parse_seed(value: Any) -> int:
    """A seed as torch takes it.

    Raises:
        InputMismatch: it has more than 64 bits.
    """
    if not -(1 << 63) <= value < 1 << 64:
        raise InputMismatch(f"the seed {value} has more than 64 bits", next_step="give a smaller one")
    return int(value)


def _choice_spec(choice: Any) -> Any:
    """A choice as it is asked for."""
    return dict(choice) or None
