"""How rows of a running batch draw their tokens, each by options of its own, as ``generate`` would with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from lorac.errors import InputMismatch, Unavailable
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.prefix import IDS
from lorac.runtime.generation.driver import DecodingProgram, GenerationDriver, take_likeliest
from lorac.runtime.generation.generate import add_tokenizer
from lorac.runtime.generation.request import GenerateRequest, translate_errors
from lorac.runtime.generation.row_processors import RowProcessors

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    from lorac.runtime.generation.generating_model import GeneratingModel


@dataclass(frozen=True, eq=False)
class RowSampler:
    """How one row draws its tokens, and when it ends.

    Attributes:
        processors: transformers' logits processors for its options.
        criteria: transformers' stopping criteria but for those of ``most`` and ``last``.
        last: tokens that end it.
        most: the most tokens that it may have, those of its prompt included.
        generator: where its random numbers come from; None: it takes the likeliest token.
    """

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    last: frozenset[int]
    most: int
    generator: torch.Generator | None

    @classmethod
    def of(
        cls,
        model: GeneratingModel,
        ids: Tensor,
        seed: int | None = None,
        graph: str = MAIN_GRAPH,
        drawn: int = 0,
        **options: object,
    ) -> RowSampler:
        """Return how a row draws its tokens with options of ``generate``.

        Args:
            model: the compiled model; it keeps a cache.
            ids: the prompt, and tokens that the row drew before (length,).
            seed: of its random numbers; None: torch's own generator seeds it.
            drawn: how many of the ids it drew before.

        Raises:
            Unavailable: the options ask for beams, for drafts or for several sequences, which are no row of their own.
            InputMismatch, OptionError: as for ``generate``.
        """
        from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList

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
            decode=lambda cache, step: torch.empty(0),  # nothing is computed
            new_cache=lambda rows, capacity: model.engine.new_cache(graph, 0, capacity),
            cache_spec=spec,
        )
        driver = _RowPlanner(program, {**traits.settings, "vocab_size": spec.vocabulary}, traits.generation or {})
        driver.width = len(ids) - drawn
        own = {name: value for name, value in request.options.items() if name not in spec.prompt_inputs}
        translate_errors(lambda: driver.generate(**{**own, IDS: ids[None, : driver.width]}))
        config = driver.planned[2]
        generator = torch.Generator() if config.do_sample else None
        if generator is not None:
            generator.manual_seed(int(torch.empty((), dtype=torch.int64).random_()) if seed is None else seed)
            chances = torch.ones(spec.vocabulary)  # how many random numbers a draw takes depends on nothing else
            for _ in range(drawn):
                torch.multinomial(chances, 1, generator=generator)
        # Rows that run compare two numbers instead: transformers' criteria take eight calls of torch for each token.
        last, most, criteria = set[int](), int(config.max_length), StoppingCriteriaList()
        for one in driver.planned[1]:
            if type(one) is EosTokenCriteria:
                last.update(one.eos_token_id.flatten().tolist())
            elif type(one) is not MaxLengthCriteria or one.max_length < most:
                criteria.append(one)
        return cls(driver.planned[0], criteria, frozenset(last), most, generator)

    def ends(self, text: Tensor) -> bool:
        """Return whether a row ends with the last token of its text (length,)."""
        if len(text) >= self.most or int(text[-1]) in self.last:
            return True
        return bool(self.criteria) and bool(self.criteria(text[None], None))


class BatchSampler:
    """Draws a token for each row of a batch.

    Args:
        rows: how each row draws.
    """

    def __init__(self, rows: Sequence[RowSampler]) -> None:
        self.rows, self._process = rows, RowProcessors([row.processors for row in rows])

    def draw(self, texts: Sequence[Tensor], logits: Tensor) -> Tensor:
        """Return the next token of each row (rows,): the one that ``generate`` would draw, unless the row has failed.

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
            except RuntimeError as error:  # its adapters or processors made no probabilities
                self.failed.setdefault(index, error)
        return tokens

    @property
    def failed(self) -> dict[int, Exception]:
        """Row -> why it has no token since the last draw."""
        return self._process.failed


@final
class _RowPlanner(GenerationDriver):
    """Lets transformers prepare a call, and records the preparation instead of generating.

    Attributes:
        width: tokens of the prompt.
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

    def _prompt_width(self, model_kwargs: Any, generation_config: Any) -> int:
        return self.width
