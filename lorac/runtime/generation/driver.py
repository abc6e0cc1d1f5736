"""Drivers: transformers' generation over a program that has a cache.

A driver takes the place of a model: it has the attributes that transformers' mixin reads, taken from the model's
configuration, and adds tokens to a cache where a model would be called. So options, logits processors, stopping
criteria, streamers, beams and assistants are transformers' own. The loop that decodes one token after the other is
written here: it knows which rows are finished, samples each row from a seed of its own, and costs less per token.

This module imports transformers, so the first call of ``generate`` imports it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from lorac.argument_types import Fields, JsonMapping
from lorac.errors import InputMismatch
from lorac.frontend.hosts.transformers import require_graphs
from lorac.ir.calls.modalities import BLOCKS
from lorac.ir.graph.attention_ops import encoder_output_name
from lorac.runtime.generation.decoding_state import DecodeTokens, DecodingState
from lorac.target.kv_cache import CacheSpec, KeyValueCache

if TYPE_CHECKING:
    from transformers import LogitsProcessorList
    from transformers.generation.streamers import BaseStreamer
    from transformers.utils.generic import ModelOutput

require_graphs("generation over a cache")
CONFIG_FIELDS = (
    "bos_token_id",
    "decoder_start_token_id",
    "eos_token_id",
    "is_encoder_decoder",
    "max_position_embeddings",
    "pad_token_id",
    "vocab_size",
)
"""The fields of a model's configuration that transformers reads when it generates."""
_StepOutput: Any = CausalLMOutputWithPast
"""Its annotations name transformers' caches; it accepts any."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodingProgram:
    """The program that a driver runs.

    Attributes:
        decode: adds tokens to the rows of a cache, with the adapters of the call.
        new_cache: (rows, capacity) -> an empty cache.
        cache_spec: the limits of the cache.
        encode: runs the encoder for the rows of a cache on inputs by name; None for a program without an encoder.
        generators: random generators, each for an equal number of neighbouring rows; empty: torch's own generator.
        features: the rows' features of images or sounds, by the name of the program's input.
        fed: the tokens of each prompt as the program takes them; empty where those are the ids.
    """

    decode: DecodeTokens
    new_cache: Callable[[int, int], KeyValueCache]
    cache_spec: CacheSpec
    encode: Callable[[KeyValueCache, Mapping[str, object]], None] | None = None
    generators: Sequence[torch.Generator] = ()
    features: Mapping[str, Tensor] | None = None
    fed: Sequence[Tensor] = ()


class EndCriteria:
    """The criteria by which rows end: numbers and sets for transformers' two usual ones, which take torch eight calls.

    Args:
        criteria: transformers' criteria.

    Attributes:
        last: tokens that end a row.
        most: the number of tokens at which every row ends, its prompt included.
        others: all other criteria.
    """

    def __init__(self, criteria: Iterable[Any]) -> None:
        self.last, self.most, self.others = set[int](), sys.maxsize, StoppingCriteriaList()
        for one in criteria:
            if type(one) is EosTokenCriteria:
                self.last.update(one.eos_token_id.flatten().tolist())
            elif type(one) is MaxLengthCriteria:
                self.most = min(self.most, one.max_length)
            else:
                self.others.append(one)

    def __call__(self, texts: Any, tokens: Sequence[int], scores: tuple[Tensor, ...] | None = None) -> list[bool]:
        """Return whether each row ends.

        Args:
            texts: (rows, length).
            tokens: the last token of each row.
            scores: the scores of each new token (rows, vocabulary), if they are kept.
        """
        ends = self.others(texts, scores).tolist() if self.others else [False] * len(tokens)
        whole = texts.shape[1] >= self.most
        return [end or whole or token in self.last for end, token in zip(ends, tokens, strict=True)]


class GenerationDriver(GenerationMixin, ABC):
    """A stand-in for the model in transformers' generation: one program, one choice of adapters, one call.

    Args:
        config: the entries of the model's configuration.
        generation: the entries of the model's generation configuration.

    Attributes:
        state: the rows; None until their cache is allocated.
        encoder_inputs: the inputs of the program's encoder, by name.
        returns_cache: whether an output object has the cache.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    device = torch.device("cpu")
    dtype = torch.float32
    hf_device_map: Mapping[str, str] = {}
    _is_stateful = False
    mask_name = "attention_mask"
    output_class: Callable[..., ModelOutput] = GenerateDecoderOnlyOutput

    def __init__(self, program: DecodingProgram, config: JsonMapping, generation: JsonMapping) -> None:
        self.program = program
        self.config = transformers.PreTrainedConfig(
            **{name: config[name] for name in CONFIG_FIELDS if config.get(name) is not None}
        )
        self.generation_config = GenerationConfig(**generation)
        self.state: DecodingState | None = None
        self.encoder_inputs: dict[str, object] = {}
        self.returns_cache = True

    def __call__(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: DecodingState | None = None,
        logits_to_keep: int = 1,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> ModelOutput:
        """Add the new tokens of rows to ``cache``, or to a new cache; return logits as transformers' models do."""
        if cache is None:
            rows, length = input_ids.shape if attention_mask is None else attention_mask.shape
            cache = DecodingState(self.program.new_cache(rows, DecodingState.initial_capacity(length, length)))
        keep = logits_to_keep or input_ids.shape[1]
        return _StepOutput(logits=cache.feed(self.program.decode, input_ids, attention_mask, keep), cache=cache)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: DecodingState | None = None, **kwargs: Any
    ) -> dict[str, object]:
        """Return the whole rows as inputs; ``DecodingState.feed`` finds the new tokens."""
        keep, mask = kwargs.get("logits_to_keep", 1), {"attention_mask": attention_mask, **kwargs}.get(self.mask_name)
        return {"input_ids": input_ids, "attention_mask": mask, "cache": cache, "logits_to_keep": keep}

    def is_remote_code(self) -> bool:
        """Return False: no code from a model's repository runs here."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """Return an empty mapping: the program has one implementation of its experts."""
        return {}

    def _valid_auto_compile_criteria(self, *args: object, **kwargs: object) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        mode: object,
        rows: int,
        longest: int,
    ) -> bool:
        """Allocate a cache for rows that may grow to ``longest`` + 1 columns."""
        mask, spec = model_kwargs.get(self.mask_name), self.program.cache_spec
        width = self.prompt_width(model_kwargs, generation_config)
        count = width if mask is None else int(mask.sum(1).max())
        new, left = longest + 1 - width, spec.after(count)
        if left is not None and new > left:
            fewer = f"max_new_tokens={left} or less, or a shorter prompt"
            raise InputMismatch(
                f"{count} tokens and {new} new ones are more than the model has positions for: {spec.limit}",
                next_step=f"give {fewer if left > 0 else f'a prompt of {spec.limit} tokens or less'}",
            )
        if model_kwargs.get("cache") is None:
            empty = self.program.new_cache(rows, DecodingState.initial_capacity(count, new))
            if self.program.encode is not None:
                self.program.encode(empty, self.encoder_inputs)
            model_kwargs["cache"] = DecodingState(empty)
        self.state = state = model_kwargs["cache"]
        state.blocks = (self.program.features or {}).get(encoder_output_name(BLOCKS))
        if self.program.features:
            state.fed = self.program.fed
            state.cache.set_encoder_outputs(self.program.features)
        state.max_length = max(count + new, state.cache.capacity)
        state.chunk_size = generation_config.prefill_chunk_size
        return True

    @abstractmethod
    def prompt_width(self, model_kwargs: Fields, generation_config: Any) -> int:
        """Return the number of columns of the prompts."""

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Compute each prompt once, however many beams or sequences it has."""
        state, mask = model_kwargs["cache"], model_kwargs.get(self.mask_name)
        copies = input_ids.shape[0] // len(state.cache.lengths)
        logits = state.feed(self.program.decode, input_ids[::copies], mask if mask is None else mask[::copies], 1)
        state.select([row for row in range(logits.shape[0]) for _ in range(copies)])
        return _StepOutput(logits=logits if copies == 1 else logits.repeat_interleave(copies, 0), cache=state)

    def _sample(
        self,
        input_ids: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """Decode token by token, greedily or by sampling; the sequences are bitwise those of transformers' loop.

        Where the criteria have an end token, a finished row gets no further tokens and its later scores are zeros:
        only then does transformers pad the row.
        """
        as_object = generation_config.return_dict_in_generate
        kept_scores: tuple[Tensor, ...] | None = () if as_object and generation_config.output_scores else None
        kept_logits: tuple[Tensor, ...] | None = () if as_object and generation_config.output_logits else None
        pads = any(getattr(criterion, "eos_token_id", None) is not None for criterion in stopping_criteria)
        ends, state = EndCriteria(stopping_criteria), model_kwargs["cache"]
        logits = self._prefill(input_ids, generation_config, model_kwargs).logits[:, -1]
        unfinished = every_row = [1] * input_ids.shape[0]
        while True:
            logits = logits.to(torch.float32)
            scores = logits_processor(input_ids, logits)
            kept_scores = None if kept_scores is None else (*kept_scores, scores)
            kept_logits = None if kept_logits is None else (*kept_logits, logits)
            tokens = self._draw(scores) if generation_config.do_sample else take_likeliest(scores)
            if pads and not all(unfinished):
                finished = torch.tensor(unfinished) == 0
                tokens = tokens.masked_fill(finished, generation_config._pad_token_tensor)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            ended = ends(input_ids, tokens.tolist(), kept_scores)
            unfinished = [int(here and not end) for here, end in zip(unfinished, ended, strict=True)]
            if streamer is not None:
                streamer.put(tokens.cpu())
            if not any(unfinished):
                break
            logits = state.step(self.program.decode, tokens, unfinished if pads else every_row)
        if streamer is not None:
            streamer.end()
        if not as_object:
            return input_ids
        cache = state if self.returns_cache else None
        return self.output_class(sequences=input_ids, scores=kept_scores, logits=kept_logits, cache=cache)

    def _draw(self, scores: Tensor) -> Tensor:
        """Draw a token for each row."""
        probabilities = torch.nn.functional.softmax(scores, dim=-1)
        generators = self.program.generators
        if not generators:
            return torch.multinomial(probabilities, num_samples=1).squeeze(1)
        parts = zip(probabilities.chunk(len(generators)), generators, strict=True)
        return torch.cat([torch.multinomial(part, 1, generator=generator) for part, generator in parts]).squeeze(1)


@final
class DecoderDriver(GenerationDriver):
    """The driver of a program whose only input is the sequence."""

    def prompt_width(self, model_kwargs: Fields, generation_config: Any) -> int:
        """Return the mask's width; without padding, transformers gives the width alone."""
        mask = model_kwargs.get(self.mask_name)
        return int(generation_config._mask_length if mask is None else mask.shape[1])


def take_likeliest(scores: Tensor) -> Tensor:
    """Return each row's token with the highest score, the first among equals; NaN counts as the highest.

    NumPy's argmax is vectorized: it takes a twelfth of torch's time or less.

    Args:
        scores: (rows, vocabulary).
    """
    return torch.from_numpy(scores.detach().cpu().numpy().argmax(-1)).to(scores.device)
