"""``generate``: checks a call, splits its rows where they cannot share a run, and merges the outputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from lorac.argument_types import check_type
from lorac.errors import InputMismatch, Unavailable, WrongType, short, translate_import_errors
from lorac.frontend.components import check_component, list_components
from lorac.ir.calls.call import cast_tensors
from lorac.ir.calls.row_selection import count_rows
from lorac.ir.graph.attention_ops import DECODER_IDS
from lorac.ir.slots.choice import UNSET, ChoiceSpec
from lorac.ir.slots.prefix import IDS, MASK
from lorac.runtime.batching import check_rows
from lorac.runtime.choice_switch import RowGroup
from lorac.runtime.generation.eager_generation import generate_eagerly, refuse_prompt_cache
from lorac.runtime.generation.output_merger import merge_outputs, select_rows
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.runtime.generation.prompt_features import PromptFeatures
from lorac.runtime.generation.prompts import CACHE, Prompts, main_input
from lorac.runtime.generation.request import GenerateRequest, translate_errors
from lorac.runtime.traits import ModelTraits

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput

    from lorac.runtime.choice_states import ChoiceState
    from lorac.runtime.choice_switch import ChoiceSwitch
    from lorac.target.engine import BoundProgram, Engine

    Output = torch.Tensor | ModelOutput
    Run = Callable[[BoundProgram, ChoiceState, BoundProgram | None], Output]

Seeds = int | list[int] | None
"""One seed for a run, or one for each of its rows."""


class GeneratingModel(Protocol):
    """The attributes of ``Compiled`` that generation and the scheduler read."""

    engine: Engine
    switch: ChoiceSwitch
    traits: Mapping[str, ModelTraits]
    input_dtypes: Mapping[torch.dtype, torch.dtype]

    @property
    def prompt_caches(self) -> MutableMapping[int, PromptCache]: ...

    @property
    def tokenizer(self) -> Any: ...


def generate(
    model: GeneratingModel,
    graph: str,
    options: Mapping[str, object],
    *,
    adapters: Any,
    seed: object,
    draft: ChoiceSpec,
    prompt_cache: PromptCache | None,
) -> Output:
    """Continue sequences with a compiled model; see ``Compiled.generate``.

    Args:
        model: the compiled model.
        graph: the component's name.
        options: inputs, and transformers' options.
        adapters, seed, draft, prompt_cache: as for ``Compiled.generate``.
    """
    traits = model.traits[check_component(graph, model.traits)]
    module = model.engine.module
    host = None if module is None else list_components(module)[graph]
    if traits.generation is None and not callable(getattr(host, "generate", None)):
        raise Unavailable(
            "the model does not generate",
            next_step="load a model whose can_generate() is true, such as one of AutoModelForCausalLM",
        )
    if traits.generation is not None:
        with translate_import_errors():
            import transformers  # noqa: F401  (only whether it is installed)
    if prompt_cache is not None:
        next_step = "give a lorac.PromptCache(), the same one at each call"
        check_type(prompt_cache, PromptCache, "prompt_cache=", next_step=next_step)
        model.prompt_caches[id(prompt_cache)] = prompt_cache
    call = _check_cached(model, graph, traits, options) if host is None else _check_eager(model, graph, host, options)
    request = call.request if draft is UNSET else call.request.with_draft()
    with torch.no_grad():
        return replace(call, request=request, draft=draft, prompt_cache=prompt_cache).generate(adapters, seed)


def _check_cached(
    model: GeneratingModel, graph: str, traits: ModelTraits, given: Mapping[str, object]
) -> _GenerateCall:
    """Check a call that runs over a cache."""
    spec = model.engine.cache_spec(graph)
    if spec is None:
        model.engine.refuse_cache()
    if spec.encodes:
        return _check_encoder_decoder(model, graph, traits, given, spec.encodes)
    request = GenerateRequest(_name_first_argument(given), traits.generation or {})
    request.check_names((IDS, MASK, CACHE, *spec.prompt_inputs), by_model=False)
    request = add_tokenizer(model, request)
    if IDS not in request.options:
        raise _missing_prompt()
    prompts = Prompts.of(request.options[IDS], request.options.get(MASK), request.pad_id, request.end_ids)
    features = PromptFeatures.of(request.options, spec.reads, traits, prompts)
    text = {name: value for name, value in request.options.items() if name not in spec.prompt_inputs}
    return _GenerateCall(
        model=model, graph=graph, request=replace(request, options=text), prompts=prompts, features=features
    )


def _check_encoder_decoder(
    model: GeneratingModel, graph: str, traits: ModelTraits, given: Mapping[str, object], encodes: Sequence[str]
) -> _GenerateCall:
    """Check a call of an encoder-decoder that runs over a cache."""
    main, token_inputs = main_input(encodes), (DECODER_IDS, f"decoder_{MASK}")
    named = _name_first_argument(given, main)
    options = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in named.items()}
    request = GenerateRequest(options, traits.generation or {})
    own_options: Collection[str] = ()
    if traits.rules is not None:
        from lorac.runtime.generation.encoder_decoder_driver import load_rules_class

        rules: Any = load_rules_class(traits.rules)
        own_options = inspect.signature(rules.generate).parameters
    request.check_names((*encodes, *token_inputs, *own_options), by_model=False)
    request = add_tokenizer(model, request)
    if main not in request.options:
        raise InputMismatch("the call gives the encoder no input", next_step=f"give {main}=, such as a processor makes")
    rows = _count_rows(main, request.options[main])
    ids, mask = (request.options.get(name) for name in token_inputs)
    prompts = None if ids is None else Prompts.of(ids, mask, None, ())  # many decoders begin with padding
    if prompts is not None and len(prompts.counts) != rows:
        raise InputMismatch(
            f"{main} has {rows} rows, and {DECODER_IDS} {len(prompts.counts)}", next_step="give one of each per row"
        )
    as_numpy = isinstance(named.get(main), np.ndarray)
    return _GenerateCall(
        model=model, graph=graph, request=request, prompts=prompts, token_inputs=token_inputs, as_numpy=as_numpy
    )


def _check_eager(model: GeneratingModel, graph: str, host: Any, given: Mapping[str, object]) -> _GenerateCall:
    """Check a call of the model's own ``generate``; options only where that is transformers'."""
    traits = model.traits[graph]
    is_decoder = traits.generation is not None and not traits.settings.get("is_encoder_decoder")
    request = GenerateRequest(_name_first_argument(given) if is_decoder else dict(given), traits.generation or {})
    if traits.generation is not None:
        inputs = (host.forward, host.prepare_inputs_for_generation, host.generate)
        request.check_names([name for f in inputs for name in inspect.signature(f).parameters], by_model=True)
        request = add_tokenizer(model, request)
    ids, prompts = request.options.get(IDS), None
    tensors = [value for value in request.options.values() if isinstance(value, torch.Tensor | np.ndarray)]
    if is_decoder and ids is None and not tensors:
        raise _missing_prompt()
    one_code = not isinstance(ids, torch.Tensor) or ids.dim() <= 2  # with several codes per token, the model pads
    if is_decoder and ids is not None and one_code:
        prompts = Prompts.of(ids, request.options.get(MASK), request.pad_id, request.end_ids)
    return _GenerateCall(model=model, graph=graph, request=request, prompts=prompts)


@dataclass(frozen=True, eq=False, kw_only=True)
class _GenerateCall:
    """A call of ``generate`` with checked options.

    Attributes:
        model: the compiled model.
        graph: the component's name.
        request: options and inputs.
        prompts: the rows; None for a model that begins with other inputs, or a decoder with its own start tokens.
        token_inputs: names of the inputs for the prompts' tokens and mask.
        as_numpy: whether sequences are returned as arrays.
        draft: the choice that drafts tokens; ``UNSET``: no draft.
        prompt_cache: the cache of prompts between calls, or None.
        seeds: seeds of random numbers.
        features: the images or sounds of the rows.
    """

    model: GeneratingModel
    graph: str
    request: GenerateRequest
    prompts: Prompts | None
    token_inputs: tuple[str, str] = (IDS, MASK)
    as_numpy: bool = False
    draft: ChoiceSpec = UNSET
    prompt_cache: PromptCache | None = None
    seeds: Seeds = None
    features: PromptFeatures | None = None

    def generate(self, adapters: Any, seed: object) -> Output:
        """Run the rows, grouped by choice, seed and draft, and merge the outputs in the order of the batch."""
        rows = count_rows(self.request.options.values())
        if self.features is not None and self.request.drafts:
            raise Unavailable(
                f"{self.features.modality.main}= is for the model that answers, and a draft cannot read it",
                next_step="leave draft= and assistants out",
            )
        call = replace(self, seeds=_parse_seeds(seed, rows))
        seed_apart = isinstance(call.seeds, list) and not (self.request.samples_rows and self._over_cache)
        apart = seed_apart or self.request.drafts

        def run(groups: list[RowGroup]) -> Any:
            groups = [RowGroup(group.choice, [row]) for group in groups for row in group.rows] if apart else groups
            output: Any = call._run_groups(groups, rows)
            if not self.as_numpy and not isinstance(self.request.options.get(IDS), np.ndarray):
                return output
            if isinstance(output, torch.Tensor):
                return output.numpy()
            output["sequences"] = output["sequences"].numpy()
            return output

        if not isinstance(adapters, Sequence) or isinstance(adapters, str):
            return run([RowGroup(adapters, list(range(rows)))])
        check_rows(rows, adapters)
        # A model's own ``generate`` may call the model with other rows, as for guidance.
        traits = self.model.traits[self.graph]
        keeps_rows = self._over_cache or (traits.generation is not None and traits.rules is None)
        together = not apart and keeps_rows and self.features is None
        return self.model.switch.run_grouped(adapters, self.graph, run, together=together)

    def _run_groups(self, groups: Sequence[RowGroup], rows: int) -> Output:
        if len(groups) == 1:
            return self._run(groups[0])
        for name in ("streamer", CACHE):
            if self.request.options.get(name) is not None:
                raise Unavailable(
                    f"{name}= is for one run, and these rows need {len(groups)} runs",
                    next_step="call once per choice of adapters, or leave it out",
                )
        outputs = []
        for group in groups:
            own = replace(
                self,
                request=replace(self.request, options=select_rows(self.request.options, group.rows, rows)),
                prompts=None if self.prompts is None else self.prompts.rows(group.rows),
                features=None if self.features is None else self.features.rows(group.rows),
                seeds=[self.seeds[row] for row in group.rows] if isinstance(self.seeds, list) else self.seeds,
            )
            outputs.append(own._run(group))
        rows_of_groups = [group.rows for group in groups]
        return merge_outputs(outputs, rows_of_groups, self.request.fill_id, self.request.beams)

    @property
    def _over_cache(self) -> bool:
        return self.model.engine.module is None

    def _run(self, group: RowGroup) -> Output:
        """Generate all rows of a group in one run (invariant 7)."""
        options, prompts = dict(self.request.options), self.prompts
        if prompts is not None:
            prompts = prompts.trim() if self.request.drafts else prompts
            options = {name: prompts.arrange(value) for name, value in options.items()}
            mask = torch.ones_like(prompts.ids) if prompts.mask is None else prompts.mask
            options |= dict(zip(self.token_inputs, (prompts.ids, mask), strict=True))
        output = self._bind(group, self._make_run(group, options, prompts), prompts)
        if prompts is None:
            return output
        if isinstance(output, torch.Tensor):
            return prompts.restore(output)
        output["sequences"] = prompts.restore(output["sequences"])
        return output

    def _make_run(self, group: RowGroup, options: dict[str, object], prompts: Prompts | None) -> Run:
        if not self._over_cache:
            refuse_prompt_cache(self.prompt_cache, "the model's own generation keeps no prompts between calls")
            cast = cast_tensors(options, self.model.input_dtypes)
            return functools.partial(generate_eagerly, self.graph, self.request, cast, self.seeds)
        from lorac.runtime.generation.cached_generation import CachedGeneration

        if self.token_inputs[0] != IDS:
            refuse_prompt_cache(self.prompt_cache, "a decoder's sequence depends on the encoder, and begins no other")
        spec = self.model.engine.cache_spec(self.graph)
        assert spec is not None
        return CachedGeneration(
            engine=self.model.engine,
            graph=self.graph,
            cache_spec=spec,
            traits=self.model.traits[self.graph],
            prompts=prompts,
            request=self.request,
            options=options,
            seeds=self.seeds,
            prompt_cache=self.prompt_cache,
            row_states=group.states if group.mixed else (),
            features=self.features,
        )

    def _bind(self, group: RowGroup, run: Run, prompts: Prompts | None) -> Output:
        """Call ``run`` with the group's program and state and, if there is a draft, with the draft's program."""
        switch, known = self.model.switch, None if self.token_inputs[0] != IDS else prompts

        def at(program: BoundProgram) -> BoundProgram:
            return program if known is None else program.for_prompts(known.ids, known.mask)

        def bind(drafting: BoundProgram | None) -> Output:
            return switch.with_rows(group, lambda own, state: translate_errors(lambda: run(at(own), state, drafting)))

        if self.draft is UNSET:
            return bind(None)
        if switch.engine.fused:
            raise Unavailable(
                "weights hold one choice of adapters at a time, and a draft is a second",
                next_step="compile with mode='live', or leave draft= out",
            )
        return switch.with_choice(self.draft, lambda drafting, _: bind(at(drafting)))


def _missing_prompt() -> InputMismatch:
    return InputMismatch("the call has no prompt", next_step="give input_ids=, such as a tokenizer makes")


def _name_first_argument(given: Mapping[str, object], main: str = IDS) -> dict[str, object]:
    """Return the arguments, the positional one (``inputs``) under the name of the main input."""
    if given.get("inputs") is not None and given.get(main) is not None:
        raise InputMismatch(f"{main}= is given twice: it is the first argument too", next_step="leave one of them out")
    return {main if name == "inputs" else name: value for name, value in given.items()}


def _count_rows(name: str, value: object) -> int:
    """Return the number of rows to encode."""
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        raise WrongType(f"{name}= is not a batch: {short(value)}", next_step="give a tensor with one row per sequence")
    if not value.numel():
        raise InputMismatch(f"{name}= of shape {list(value.shape)} is empty", next_step="give one row or more")
    return int(value.shape[0])


def add_tokenizer(model: GeneratingModel, request: GenerateRequest) -> GenerateRequest:
    """Check the types of options, and add the model's tokenizer where an option needs it and the call gives none."""
    request.check_types()
    tokenizer = request.options.get("tokenizer")
    if tokenizer is None and (request.option("stop_strings") or request.option("token_healing")):
        tokenizer = model.tokenizer
    request.check_stopping(tokenizer)
    return request if tokenizer is None else request.with_options({"tokenizer": tokenizer})


def _parse_seeds(seed: object, rows: int) -> Seeds:
    """Return the seed of all rows, a list with a seed for each row, or None."""
    if seed is None or isinstance(seed, Integral):
        return None if seed is None else _parse_seed(seed)
    if not isinstance(seed, Sequence) or not all(isinstance(one, Integral) for one in seed):
        raise WrongType(f"seed= is {short(seed)}", next_step="give a whole number, or one per row")
    if len(seed) != rows:
        raise InputMismatch(f"{len(seed)} seeds for {rows} rows", next_step="give one per row, or one for all")
    return [_parse_seed(one) for one in seed]


def _parse_seed(value: Integral) -> int:
    """Return a seed as an int of 64 bits."""
    number = int(value)
    if not -(1 << 63) <= number < 1 << 64:
        raise InputMismatch(f"the seed {number} has more than 64 bits", next_step="give a smaller one")
    return number
