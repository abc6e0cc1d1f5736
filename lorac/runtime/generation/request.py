"""The options of one call of ``generate``, checked before anything runs, and the model in the role of a draft."""

import copy
import inspect
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypeVar

import torch

from lorac.argument_types import Fields
from lorac.errors import InputMismatch, OptionError, Unavailable, WrongType, nearest_name, short
from lorac.runtime.generation.option_support import MISPLACED, REFUSED

T = TypeVar("T")
LORAC_OPTIONS = ("adapters", "draft", "prompt_cache", "seed")
"""Options of ``generate`` that transformers does not have."""
_DRAFT_OPTIONS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")
_COUNT_OPTIONS = ("num_beams", "num_return_sequences", "prefill_chunk_size")
"""Options that are positive whole numbers."""
_TOKEN_ID_OPTIONS = ("eos_token_id", "pad_token_id")
"""Options that are token ids; lorac's decoding loop reads them."""
_OBJECT_OPTIONS = {
    "assistant_model": ("generate", "a model of transformers"),
    "streamer": ("put", "a streamer of transformers, or an object with its methods put and end"),
    "tokenizer": ("get_vocab", "a tokenizer of transformers"),
}
"""Option that is an object -> the method that the object must have, and the advice where it lacks it."""


@dataclass(frozen=True)
class GenerateRequest:
    """The options of one call.

    Attributes:
        options: transformers' options and inputs, as the caller gave them.
        defaults: the entries of the model's generation configuration.
        has_draft: whether another choice of adapters drafts tokens.
    """

    options: Fields
    defaults: Fields
    has_draft: bool = False

    def with_options(self, more: Mapping[str, object]) -> "GenerateRequest":
        """Return a copy with further options."""
        return replace(self, options={**self.options, **more})

    def with_draft(self) -> "GenerateRequest":
        """Return a copy in which another choice of adapters drafts tokens.

        Raises:
            InputMismatch: another option asks for a draft too.
            Unavailable: the call gives both ``stop_strings`` and ``do_sample``.
        """
        for name in _DRAFT_OPTIONS:
            if self.options.get(name):
                raise InputMismatch(
                    f"draft= and {name}= both draft tokens, and only one can", next_step="leave one of them out"
                )
        if self.option("stop_strings") and self.option("do_sample"):
            raise Unavailable(
                "draft= adds several sampled tokens at a time, and stop_strings= is looked for after the last of them",
                next_step="leave one of them out, or give do_sample=False",
            )
        return replace(self, has_draft=True)

    def option(self, name: str) -> Any:
        """Return an option from the call, else from its ``generation_config``, else from the model's."""
        config = self.options.get("generation_config")
        for value in (self.options.get(name), getattr(config, name, None), self.defaults.get(name)):
            if value is not None:
                return value
        return None

    @property
    def beams(self) -> int:
        """The number of beams of each row."""
        return int(self.option("num_beams") or 1)

    @property
    def samples_rows(self) -> bool:
        """Whether each row samples its tokens one by one: no beams, no drafts."""
        return bool(self.option("do_sample")) and self.beams == 1 and not self.drafts

    @property
    def drafts(self) -> bool:
        """Whether tokens are drafted: by other adapters, another model or a lookup in the prompt."""
        return self.has_draft or any(self.option(name) for name in _DRAFT_OPTIONS)

    @property
    def pad_id(self) -> int | None:
        """The id of padding, or None."""
        value = self.option("pad_token_id")
        return None if value is None else int(value)

    @property
    def end_ids(self) -> list[int]:
        """The ids that end a sequence."""
        value = self.option("eos_token_id")
        if isinstance(value, torch.Tensor):
            return value.flatten().tolist()
        return [] if value is None else [int(one) for one in (value if isinstance(value, Iterable) else [value])]

    @property
    def fill_id(self) -> int:
        """The id that pads sequences after their end."""
        return next((one for one in (self.pad_id, *self.end_ids) if one is not None), 0)

    def check_names(self, inputs: Collection[str], *, by_model: bool) -> None:
        """Check that each option and input is known and supported.

        Args:
            inputs: names of the inputs.
            by_model: whether the model itself generates, by transformers' own code.

        Raises:
            Unavailable: a program with a cache cannot honour an option.
            OptionError: a name is neither an option nor an input.
        """
        from transformers import GenerationConfig, GenerationMixin

        parameters = inspect.signature(GenerationMixin.generate).parameters
        theirs = {n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD and n != "self"}
        theirs |= {name for name in vars(GenerationConfig()) if name[0] != "_"}
        theirs |= {"tokenizer", "assistant_tokenizer"}
        known, config = {*theirs, *inputs}, None if by_model else self.options.get("generation_config")
        taken = known if by_model else {*inputs} - theirs
        refused = {
            name: why for name, why in {**MISPLACED, **({} if by_model else REFUSED)}.items() if name not in taken
        }
        for name, refusal in refused.items():
            if refusal.applies(self.options.get(name)) or refusal.applies(getattr(config, name, None)):
                raise Unavailable(f"{name}= {refusal.why}", next_step=refusal.next_step)
        for name in [name for name in self.options if name not in known and name not in refused]:
            raise OptionError(
                f"generate has no option '{name}'",
                nearest=nearest_name(name, known),
                next_step=f"it takes {', '.join(LORAC_OPTIONS)}, and the options of transformers' generate",
            )

    def check_types(self) -> None:
        """Raise ``WrongType`` for options whose wrong type transformers reports late or never."""
        from transformers import GenerationConfig

        config = self.options.get("generation_config")
        if config is not None and not isinstance(config, GenerationConfig):
            raise _wrong_type("generation_config", config, "a transformers.GenerationConfig, or its options one by one")
        for name in _COUNT_OPTIONS:
            if (value := self.option(name)) is not None and not (_is_whole_number(value) and value > 0):
                raise _wrong_type(name, value, "a whole number from 1 on")
        for name in _TOKEN_ID_OPTIONS:
            value = self.option(name)
            if isinstance(value, torch.Tensor):
                are_ids = not (value.is_floating_point() or value.dtype == torch.bool)
            else:
                several = isinstance(value, list | tuple | set)
                are_ids = all(map(_is_whole_number, value if several else [value]))
            if value is not None and not are_ids:
                raise _wrong_type(name, value, "a token id" + ", or several" * (name == "eos_token_id"))
        for name, (method, advice) in _OBJECT_OPTIONS.items():
            if (value := self.options.get(name)) is not None and not callable(getattr(value, method, None)):
                raise _wrong_type(name, value, advice)
        for processor in _as_sequence(self.options.get("logits_processor")):
            if not callable(processor):
                raise _wrong_type(
                    "logits_processor", processor, "a list of transformers' LogitsProcessor, or functions"
                )

    def check_stopping(self, tokenizer: object) -> None:
        """Check the criteria that end a sequence.

        Args:
            tokenizer: the call's or the model's, or None.

        Raises:
            WrongType: a criterion is not callable.
            Unavailable: ``stop_strings`` is given without a tokenizer, or together with ``assistant_model``.
        """
        for criterion in _as_sequence(self.options.get("stopping_criteria")):
            if not callable(criterion):
                raise WrongType(
                    f"stopping_criteria= holds {short(criterion)}, which cannot be called",
                    next_step="give transformers' StoppingCriteria, or functions; stop_strings= takes strings",
                )
        if self.option("stop_strings") and tokenizer is None:
            raise Unavailable(
                "stop_strings= needs a tokenizer, and none is known",
                next_step="give tokenizer=, or set compiled.tokenizer",
            )
        if self.option("stop_strings") and self.options.get("assistant_model") is not None:
            raise Unavailable(
                "transformers looks for stop_strings= in drafts of assistant_model= too, and has no tokenizer there",
                next_step="leave one of them out; draft= takes stop_strings= with do_sample=False",
            )

    def stopping_criteria(self) -> list[Callable[..., object]]:
        """Return the criteria that end a sequence, except its length and end tokens."""
        from transformers import StopStringCriteria

        criteria: list[Any] = [*_as_sequence(self.options.get("stopping_criteria"))]
        if strings := self.option("stop_strings"):
            criteria.append(StopStringCriteria(self.options["tokenizer"], strings))
        return criteria


def _as_sequence(value: object) -> Sequence[object]:
    """Return a sequence unchanged, None as an empty sequence, and any other value as a sequence of one."""
    return () if value is None else value if isinstance(value, Sequence) else (value,)


def _is_whole_number(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _wrong_type(name: str, value: object, advice: str) -> WrongType:
    return WrongType(f"{name}= is {short(value)}", next_step=f"give {advice}")


def translate_errors(run: Callable[[], T]) -> T:
    """Call ``run``; translate errors that transformers' code raises.

    Raises:
        InputMismatch: transformers refuses the call, or fails in it.
    """
    try:
        return run()
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError) as error:
        trace, module = error.__traceback__, ""
        while trace is not None:
            module, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
        if module.partition(".")[0] != "transformers":
            raise
        reason, last = str(error).strip().partition("\n")[0], traceback.extract_tb(error.__traceback__)[-1]
        refuses = (last.line or "").startswith("raise")
        how = "refuses this call" if refuses else f"fails at {last.filename}:{last.lineno} in this call"
        raise InputMismatch(
            f"transformers {how}: {reason}", next_step="see transformers' list of generation options"
        ) from error


_SETTINGS = ("assistant_confidence_threshold", "num_assistant_tokens", "num_assistant_tokens_schedule")
"""Options that transformers reads from the assistant's generation configuration, not from the call's."""


class DraftModel:
    """A model that drafts tokens for the same model with other adapters.

    Its generation configuration is a copy: changes do not reach the model's.

    transformers evaluates stopping criteria once for all the tokens that a draft adds. So a greedy draft ends before
    the token that would stop the sequence: the model itself then adds that token last.

    Args:
        model: the model, or a driver.
        run: calls a function with the model while the draft's adapters are active.
        request: the options of the call.
    """

    def __init__(self, model: Any, run: Callable[[Callable[[Any], object]], Any], request: GenerateRequest) -> None:
        self._model, self._run = model, run
        self._criteria = [] if request.option("do_sample") else request.stopping_criteria()
        self.generation_config = copy.deepcopy(model.generation_config)
        given = {name: request.option(name) for name in _SETTINGS}
        self.generation_config.update(**{name: value for name, value in given.items() if value is not None})

    def generate(self, generation_config: Any, **options: Any) -> Any:
        """Generate; options are merged into the configuration, since transformers warns where a call gives both."""
        config = copy.deepcopy(generation_config)
        rest = config.update(**options)
        config.stop_strings = None
        output = self._run(lambda model: model.generate(generation_config=config, **rest))
        return self._cut(output)

    def _cut(self, output: Any) -> Any:
        """Cut an output before the first drafted token that stops the sequence."""
        begin = output.sequences.shape[1] - len(output.scores)
        for count in range(len(output.scores)) if self._criteria else ():
            stops = [criterion(output.sequences[:, : begin + count + 1], None) for criterion in self._criteria]
            if any(bool(torch.as_tensor(stop).all()) for stop in stops):
                output.sequences = output.sequences[:, : begin + count]
                output.scores = output.scores[: max(count, 1)]
                break
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
