"""``GenerationDriver`` and ``DecoderDriver``: a program that keeps a cache, as transformers generates from it.

It is no model: what transformers' mixin asks of one is answered from what was told of the host, and where it would call
a model, tokens are added to a cache. So options, logits processors, stopping criteria, streamers, beams and assistants
are transformers' own. The loop for one token after the other is written here, since it has to know which rows are done,
draws each row from a seed of its own, and costs less per token.

This module imports transformers, so it is imported by the first call of ``generate``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from lorac.errors import InputMismatch
from lorac.runtime.generation.decoding_state import DecodingState, ExtendCache
from lorac.target.kv_cache import CacheSpec, KeyValueCache

CONFIG_FIELDS = (
    "bos_token_id",
    "decoder_start_token_id",
    "eos_token_id",
    "is_encoder_decoder",
    "max_position_embeddings",
    "pad_token_id",
    "vocab_size",
)
"""What transformers asks of a model's configuration when it generates."""
_StepOutput: Any = CausalLMOutputWithPast
"""It is annotated with caches of transformers' own, and takes any."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodingProgram:
    """What a driver runs.

    Attributes:
        extend: adds tokens to the rows of a cache, with the adapters of the call.
        make: (rows, capacity) -> an empty cache.
        encode: has an encoder run for the rows of a cache, of inputs by name; None where there is none.
        keeps: what such a cache can hold.
        generators: whom tokens are drawn by, each for as many rows beside each other; none: torch's own.
    """

    extend: ExtendCache
    make: Callable[[int, int], KeyValueCache]
    keeps: CacheSpec
    encode: Callable[[KeyValueCache, Mapping[str, Any]], None] | None = None
    generators: Sequence[torch.Generator] = ()


class GenerationDriver(GenerationMixin, ABC):
    """Generates from one program with one choice of adapters; one call uses it. What is begun with, each kind says.

    Args:
        run: what computes.
        config: the host's configuration, by name.
        generation: its generation configuration, by name.

    Attributes:
        text: the rows, once there are some.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    device = torch.device("cpu")
    dtype = torch.float32
    hf_device_map: Mapping[str, Any] = {}
    _is_stateful = False
    mask_name = "attention_mask"
    answers: Any = GenerateDecoderOnlyOutput
    """It is annotated with caches of transformers' own, and takes any."""

    def __init__(self, run: DecodingProgram, config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
        self.run = run
        self.config = PreTrainedConfig(**{name: config[name] for name in CONFIG_FIELDS if config.get(name) is not None})
        self.generation_config = GenerationConfig(**generation)
        self.text: DecodingState | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: DecodingState | None = None,
        logits_to_keep: int = 1,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> Any:
        """Add what is new of some rows to a cache, or to one of its own; as a model of transformers' answers."""
        if cache is None:
            rows, length = input_ids.shape if attention_mask is None else attention_mask.shape
            cache = DecodingState(self.run.make(rows, DecodingState.room(length, length)))
        keep = logits_to_keep or input_ids.shape[1]
        return _StepOutput(logits=cache.feed(self.run.extend, input_ids, attention_mask, keep), cache=cache)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: DecodingState | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The whole rows: what is new of them, the cache tells."""
        keep, mask = kwargs.get("logits_to_keep", 1), {"attention_mask": attention_mask, **kwargs}.get(self.mask_name)
        return {"input_ids": input_ids, "attention_mask": mask, "cache": cache, "logits_to_keep": keep}

    def is_remote_code(self) -> bool:
        """Nothing that came with a model runs here."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """The program has none to choose from."""
        return {}

    def _valid_auto_compile_criteria(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, rows: int, longest: int
    ) -> bool:
        """Have a cache for rows that may become one token longer than ``longest`` columns.

        Raises:
            InputMismatch: that is longer than the model's positions go.
        """
        mask, keeps = model_kwargs.get(self.mask_name), self.run.keeps
        width = self._width(model_kwargs, generation_config)
        count = width if mask is None else int(mask.sum(1).max())
        new, left = longest + 1 - width, keeps.after(count)
        if left is not None and new > left:
            fewer = f"max_new_tokens={left} or less, or a shorter prompt"
            raise InputMismatch(
                f"{count} tokens and {new} new ones are more than the model has positions for: {keeps.limit}",
                next_step=f"give {fewer if left > 0 else f'a prompt of {keeps.limit} tokens or less'}",
            )
        if model_kwargs.get("cache") is None:
            model_kwargs["cache"] = self._begun(rows, DecodingState.room(count, new))
        self.text = model_kwargs["cache"]
        self.text.ceiling = max(count + new, self.text.cache.capacity)
        self.text.piece = generation_config.prefill_chunk_size
        generation_config.use_cache = True
        return True

    def _handed_on(self, text: DecodingState) -> DecodingState | None:
        """What of the rows an answer has."""
        return text

    @abstractmethod
    def _begun(self, rows: int, capacity: int) -> DecodingState:
        """Rows that hold nothing yet."""

    @abstractmethod
    def _width(self, model_kwargs: Mapping[str, Any], generation_config: Any) -> int:
        """Columns of the prompts."""

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], is_first_iteration: bool = True
    ) -> Any:
        """The prompts, each computed once, however many beams or sequences it is to have."""
        text, mask = model_kwargs["cache"], model_kwargs.get(self.mask_name)
        each = input_ids.shape[0] // len(text.cache.lengths)
        logits = text.feed(self.run.extend, input_ids[::each], mask if mask is None else mask[::each], 1)
        text.select([row for row in range(logits.shape[0]) for _ in range(each)])
        return _StepOutput(logits=logits.repeat_interleave(each, 0), cache=text)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """One token after the other, the likeliest or a drawn one; to the bit what transformers' own loop gives.

        A row that is done brings nothing more, and what is said of its later scores is zeros, where the criterion that
        ends it is an end token: only then transformers has padding follow.
        """
        told = _StepRecord(generation_config, self.answers)
        ends = any(getattr(criterion, "eos_token_id", None) is not None for criterion in stopping_criteria)
        pad, text = generation_config._pad_token_tensor, model_kwargs["cache"]
        logits = self._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
        going = torch.ones(input_ids.shape[0], dtype=torch.long)
        every = going.tolist()
        while True:
            logits = logits.to(torch.float32)
            scores = logits_processor(input_ids, logits)
            told.add(scores, logits)
            tokens = self._drawn(scores) if generation_config.do_sample else scores.argmax(-1)
            if ends:
                tokens = tokens * going + pad * (1 - going)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            going = going & ~stopping_criteria(input_ids, told.scores)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if not going.any():
                break
            logits = text.step(self.run.extend, tokens, going.tolist() if ends else every)
        if streamer is not None:
            streamer.end()
        return told.answer(input_ids, self._handed_on(text))

    def _drawn(self, scores: Tensor) -> Tensor:
        """A token for each row."""
        chances = torch.nn.functional.softmax(scores, dim=-1)
        if not self.run.generators:
            return torch.multinomial(chances, num_samples=1).squeeze(1)
        parts = zip(chances.chunk(len(self.run.generators)), self.run.generators, strict=True)
        return torch.cat([torch.multinomial(part, 1, generator=own) for part, own in parts]).squeeze(1)


@final
class DecoderDriver(GenerationDriver):
    """As ``GenerationDriver``, of a program that reads nothing but the text.

    Args:
        run, config, generation: as ``GenerationDriver``'s.
    """

    def _begun(self, rows: int, capacity: int) -> DecodingState:
        return DecodingState(self.run.make(rows, capacity))

    def _width(self, model_kwargs: Mapping[str, Any], generation_config: Any) -> int:
        """Where all columns are text, transformers notes only their number."""
        mask = model_kwargs.get(self.mask_name)
        return int(generation_config._mask_length if mask is None else mask.shape[1])


@dataclass
class _StepRecord:
    """What is told of each step beside its tokens.

    Attributes:
        config: says what is wanted.
        answers: what an answer with all of it is.
        scores, logits: of each step, as far as they are wanted.
    """

    config: Any
    answers: Any
    scores: tuple[Tensor, ...] | None = field(init=False)
    logits: tuple[Tensor, ...] | None = field(init=False)

    def __post_init__(self) -> None:
        wanted = self.config.return_dict_in_generate
        self.scores = () if wanted and self.config.output_scores else None
        self.logits = () if wanted and self.config.output_logits else None

    def add(self, scores: Tensor, logits: Tensor) -> None:
        """What one step gave."""
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (logits,)

    def answer(self, sequences: Tensor, text: DecodingState | None) -> Any:
        """As transformers answers."""
        if not self.config.return_dict_in_generate:
            return sequences
        return self.answers(sequences=sequences, scores=self.scores, logits=self.logits, cache=text)
