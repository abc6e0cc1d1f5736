"""What ``generate`` was asked for: transformers' options, checked before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from types import TracebackType
from typing import Any, TypeVar

import torch

from lorac.errors import InputMismatch, OptionError, Unavailable, WrongType, nearest_name, short

T = TypeVar("T")
LORAC_OPTIONS = ("adapters", "draft", "prefixes", "seed")
"""What ``generate`` takes beside transformers' options."""
_DRAFT_OPTIONS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp")
_INTERNAL_OUTPUTS = ("output_attentions", "output_hidden_states")
_UNSUPPORTED_OPTIONS = ("custom_generate", "synced_gpus", "trust_remote_code")
"""Options of transformers' that would run something else than the compiled program."""
_COUNT_OPTIONS = ("num_beams", "num_return_sequences", "prefill_chunk_size")
"""Options that are whole numbers from 1 on."""
_TOKEN_ID_OPTIONS = ("eos_token_id", "pad_token_id")
"""Options that are ids of tokens, which the loop itself reads."""
_OBJECT_OPTIONS = {
    "assistant_model": ("generate", "a model of transformers'"),
    "streamer": ("put", "a streamer of transformers', or what has its methods put and end"),
    "tokenizer": ("get_vocab", "a tokenizer of transformers'"),
}
"""Options that are objects: what each must be able to do, and what to give."""


@dataclass(frozen=True)
class GenerateRequest:
    """Options of one call.

    Attributes:
        told: transformers' options and inputs, as they were given.
        defaults: the model's generation configuration, by name.
        guessed: whether another choice of adapters guesses tokens ahead.
    """

    told: Mapping[str, Any]
    defaults: Mapping[str, Any]
    guessed: bool = False

    def having(self, more: Mapping[str, Any]) -> GenerateRequest:
        """The same with something more."""
        return replace(self, told={**self.told, **more})

    def guessing(self) -> GenerateRequest:
        """The same where another choice of adapters guesses ahead.

        Raises:
            InputMismatch: something else is to do that, too.
        """
        for name in _DRAFT_OPTIONS:
            if self.told.get(name):
                raise InputMismatch(
                    f"draft= and {name}= both guess tokens ahead, and one can", next_step="leave one of them out"
                )
        return replace(self, guessed=True)

    def option(self, name: str) -> Any:
        """An option's value: as given, of the configuration that was given, or the model's own."""
        given = self.told.get("generation_config")
        for value in (self.told.get(name), getattr(given, name, None), self.defaults.get(name)):
            if value is not None:
                return value
        return None

    @property
    def beams(self) -> int:
        """How many beams each row has."""
        return int(self.option("num_beams") or 1)

    @property
    def drawn(self) -> bool:
        """Whether tokens are drawn one after the other, each row by itself."""
        return bool(self.option("do_sample")) and self.beams == 1 and not self.drafts

    @property
    def drafts(self) -> bool:
        """Whether other adapters, another model or the text itself guesses tokens ahead."""
        return self.guessed or any(self.option(name) for name in _DRAFT_OPTIONS)

    @property
    def pad(self) -> int | None:
        """The id of padding, if there is one."""
        value = self.option("pad_token_id")
        return None if value is None else int(value)

    @property
    def ends(self) -> list[int]:
        """Ids that end a text."""
        value = self.option("eos_token_id")
        if isinstance(value, torch.Tensor):
            return value.flatten().tolist()
        return [] if value is None else [int(one) for one in (value if isinstance(value, Iterable) else [value])]

    @property
    def filler(self) -> int:
        """What sequences are filled up with behind their end."""
        return next((one for one in (self.pad, *self.ends) if one is not None), 0)

    def refuse_unknown(self, inputs: Collection[str], *, hosted: bool) -> None:
        """Raise ``OptionError`` for what is no option, and no input.

        Args:
            inputs: names of the inputs.
            hosted: whether the host runs, which may be told to generate otherwise.
        """
        known = {*_transformers_options(), *inputs}.difference(() if hosted else _UNSUPPORTED_OPTIONS)
        for name in self.told:
            if name not in known:
                raise OptionError(
                    f"generate has no option '{name}'",
                    nearest=nearest_name(name, known),
                    next_step=f"it takes {', '.join(LORAC_OPTIONS)}, and what transformers' generate takes",
                )

    def refuse_inner(self) -> None:
        """Raise ``Unavailable`` where the inside of the model is asked for, which an emitted program does not tell."""
        for name in _INTERNAL_OUTPUTS:
            if self.option(name):
                raise Unavailable(
                    f"{name}= asks for what a compiled program does not answer",
                    next_step="compile with target='eager', or leave it out",
                )

    def check_kinds(self) -> None:
        """Raise ``WrongType`` for an option of another kind than it is to be, where that came out late or never."""
        from transformers import GenerationConfig

        given = self.told.get("generation_config")
        if given is not None and not isinstance(given, GenerationConfig):
            raise _wrong_type("generation_config", given, "a transformers.GenerationConfig, or its options one by one")
        for name in _COUNT_OPTIONS:
            if (value := self.option(name)) is not None and not (_is_whole_number(value) and value > 0):
                raise _wrong_type(name, value, "a whole number from 1 on")
        for name in _TOKEN_ID_OPTIONS:
            if (value := self.option(name)) is not None and not _are_token_ids(value):
                raise _wrong_type(name, value, "an id of a token" + ", or several" * (name == "eos_token_id"))
        for name, (able, what) in _OBJECT_OPTIONS.items():
            if (value := self.told.get(name)) is not None and not callable(getattr(value, able, None)):
                raise _wrong_type(name, value, what)
        for processor in _as_sequence(self.told.get("logits_processor")):
            if not callable(processor):
                raise _wrong_type(
                    "logits_processor", processor, "a list of transformers' LogitsProcessor, or functions"
                )

    def check_stops(self, tokenizer: Any) -> None:
        """Hold against each other what ends a text.

        Args:
            tokenizer: of the call or the model; None where there is none.

        Raises:
            WrongType: a criterion cannot be called.
            Unavailable: texts are to end it, and there is no tokenizer to read them.
        """
        for criterion in _as_sequence(self.told.get("stopping_criteria")):
            if not callable(criterion):
                raise WrongType(
                    f"stopping_criteria= has {short(criterion)}, which is no criterion",
                    next_step="give transformers' StoppingCriteria, or functions of them; stop_strings= takes texts",
                )
        if self.option("stop_strings") and tokenizer is None:
            raise Unavailable(
                "stop_strings= are texts, and there is no tokenizer to read them by",
                next_step="give tokenizer=, or set compiled.tokenizer",
            )


def _as_sequence(value: Any) -> Sequence[Any]:
    """What a list holds; one that is no list, as a list; nothing of None."""
    return () if value is None else value if isinstance(value, Sequence) else (value,)


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _are_token_ids(value: Any) -> bool:
    """Whether a value is an id, or several."""
    if isinstance(value, torch.Tensor):
        return not (value.is_floating_point() or value.dtype == torch.bool)
    return all(map(_is_whole_number, value)) if isinstance(value, list | tuple | set) else _is_whole_number(value)


def _wrong_type(name: str, value: Any, what: str) -> WrongType:
    return WrongType(f"{name}= is {short(value)}", next_step=f"give {what}")


def _transformers_options() -> set[str]:
    """The options that transformers' generate takes."""
    from transformers import GenerationConfig, GenerationMixin

    taken = inspect.signature(GenerationMixin.generate).parameters
    named = {name for name, how in taken.items() if how.kind is not inspect.Parameter.VAR_KEYWORD and name != "self"}
    return {*named, *(name for name in vars(GenerationConfig()) if name[0] != "_"), "tokenizer", "assistant_tokenizer"}


def translate_errors(run: Callable[[], T]) -> T:
    """What a run gives; where transformers refuses its options, that is told by an error of lorac's.

    Raises:
        InputMismatch: it does.
    """
    try:
        return run()
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError) as error:
        if not _raised_by_transformers(error.__traceback__):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise InputMismatch(
            f"transformers refuses this call: {reason}", next_step="its documentation of generation says what it takes"
        ) from error


def _raised_by_transformers(trace: TracebackType | None) -> bool:
    """Whether an error was raised by transformers itself."""
    last = ""
    while trace is not None:
        last, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return last.partition(".")[0] == "transformers"
