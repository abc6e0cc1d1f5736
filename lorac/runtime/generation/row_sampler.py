"""Sampling in a running batch: each row draws its tokens with its own options of ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from lorac.errors import InputMismatch, Unavailable
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.prefix import IDS
from lorac.runtime.generation.driver import DecodingProgram, EndCriteria, GenerationDriver, take_likeliest
from lorac.runtime.generation.generate import add_tokenizer
from lorac.runtime.generation.request import GenerateRequest, translate_errors
from lorac.runtime.generation.row_processors import RowProcessors

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    from lorac.runtime.generation.generate import GeneratingModel


class RowSampler:
    """A row's sampling options: how its tokens are drawn, and when it ends.

    Args:
        model: the compiled model; its program has a cache.
        ids: the prompt, and the tokens that were drawn before (length,).
        seed: the seed of the row's generator; None: torch's own generator draws the seed.
        drawn: the number of the last ids that were drawn before.
        options: options of ``generate``.

    Attributes:
        processors: transformers' logits processors for the row's options.
        criteria: the criteria by which the row ends.
        generator: the row's random generator; None: it takes the likeliest token.

    Raises:
        Unavailable: the options ask for beams, drafts or several sequences, which take more than one row.
        InputMismatch, OptionError: as for ``generate``.
    """

    def __init__(
        self,
        model: GeneratingModel,
        ids: Tensor,
        seed: int | None = None,
        graph: str = MAIN_GRAPH,
        drawn: int = 0,
        **options: object,
    ) -> None:
        traits, spec = model.traits[graph], model.engine.cache_spec(graph)
        if spec is None:
            model.engine.refuse_cache()
        request = GenerateRequest(options, traits.generation or {})
        request.check_names(spec.prompt_inputs, by_model=False)
        request = add_tokenizer(model, request)
        if request.beams > 1 or request.drafts or (request.option("num_return_sequences") or 1) > 1 or spec.encodes:
            raise Unavailable(
                "a row of a running batch draws one token after the other",
                next_step="leave beams, drafts and further sequences out, or call compiled.generate",
            )
        if ids.dim() != 1 or not len(ids):
            raise InputMismatch(f"the prompt has shape {list(ids.shape)}", next_step="give its token ids, one or more")
        if not 0 <= drawn < len(ids):
            raise InputMismatch(
                f"drawn={drawn} of {len(ids)} ids",
                next_step="give a prompt of one or more ids before those that were drawn",
            )
        program = DecodingProgram(
            decode=lambda cache, step: torch.empty(0),  # ``_RowPlanner`` computes no token
            new_cache=lambda rows, capacity: model.engine.new_cache(graph, 0, capacity),
            cache_spec=spec,
        )
        driver = _RowPlanner(program, {**traits.settings, "vocab_size": spec.vocabulary}, traits.generation or {})
        driver.width = len(ids) - drawn
        own = {name: value for name, value in request.options.items() if name not in spec.prompt_inputs}
        translate_errors(lambda: driver.generate(**{**own, IDS: ids[None, : driver.width]}))
        self.processors, criteria, config = driver.planned
        self.criteria = EndCriteria(criteria)
        self.generator = torch.Generator() if config.do_sample else None
        if self.generator is not None:
            self.generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed)
            chances = torch.ones(spec.vocabulary)  # a draw consumes the same random numbers for any probabilities
            for _ in range(drawn):
                torch.multinomial(chances, 1, generator=self.generator)

    def ends(self, text: Tensor) -> bool:
        """Return whether a row ends with the last token of its text (length,)."""
        return self.criteria(text[None], [int(text[-1])])[0]


class BatchSampler:
    """A sampler that draws a token for each row of a batch.

    Args:
        rows: the sampler of each row.
    """

    def __init__(self, rows: Sequence[RowSampler]) -> None:
        self.rows, self._process = rows, RowProcessors([row.processors for row in rows])

    def draw(self, texts: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Draw the next token of each row (rows,), as ``generate`` would; the token of a row in ``failed`` is invalid.

        Args:
            texts: the tokens of each row, of any lengths.
            logits: (rows, vocabulary).
        """
        scores = self._process(texts, logits.to(torch.float32))
        tokens = take_likeliest(scores)
        drawn = [index for index, row in enumerate(self.rows) if row.generator is not None]
        for index, chances in zip(drawn, scores[drawn].softmax(-1), strict=True):
            try:
                tokens[index] = torch.multinomial(chances, 1, generator=self.rows[index].generator)[0]
            except RuntimeError as error:  # the row's scores are no probabilities, such as NaN
                self.failed.setdefault(index, error)
        return tokens

    @property
    def failed(self) -> dict[int, Exception]:
        """Row -> the error for which the last draw has no token of it."""
        return self._process.failed


@final
class _RowPlanner(GenerationDriver):
    """A driver that records how transformers prepared a call, and generates nothing.

    Attributes:
        width: number of tokens of the prompt.
        planned: the processors, the criteria and the configuration.
    """

    width: int
    planned: tuple[LogitsProcessorList, StoppingCriteriaList, GenerationConfig]

    def _sample(
        self,
        input_ids: Any,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: object = None,
        **model_kwargs: Any,
    ) -> Any:
        self.planned = logits_processor, stopping_criteria, generation_config
        return input_ids

    def prompt_width(self, model_kwargs: object, generation_config: object) -> int:
        return self.width
