"""``EncodingDriver``: a program with an encoder beside a decoder, as transformers generates from it over a cache.

transformers runs an encoder once for a call, and hands on what it answers. Here what it makes is kept beside the rows
of the cache, so that transformers has nothing to hand on; and it is run when there is a cache, once for the rows of a
batch, however many beams each is to have.

As ``driver``, this module is imported by the first call of ``generate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from transformers.generation.utils import GenerateEncoderDecoderOutput
from transformers.modeling_outputs import BaseModelOutput

from lorac.runtime.generation.driver import Driver, Run
from lorac.runtime.generation.prompts import main_input
from lorac.runtime.generation.text import Text

MASK = "decoder_attention_mask"
"""What transformers calls the mask of a decoder's text."""


@final
class EncodingDriver(Driver):
    """As ``Driver``, with an encoder.

    Args:
        run, config, generation: as ``Driver``'s.
    """

    mask_name = MASK
    answers: Any = GenerateEncoderDecoderOutput

    def __init__(self, run: Run, config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
        super().__init__(run, config, generation)
        self.main_input_name = main_input(run.keeps.encodes)
        self._inputs: dict[str, Any] = {}
        self._columns = 0

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """What a call gives was looked at before."""

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any], model_input_name: str | None, generation_config: Any
    ) -> dict[str, Any]:
        """Note what the encoder is to read; the answer that transformers hands on is empty."""
        given = {**model_kwargs, self.main_input_name: inputs_tensor}
        self._inputs = {name: given[name] for name in self.run.keeps.encodes if given.get(name) is not None}
        rows = inputs_tensor.shape[0]
        return {**model_kwargs, "encoder_outputs": BaseModelOutput(last_hidden_state=torch.empty(rows, 0, 0))}

    def _prepare_decoder_input_ids_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_decoder_input_ids_for_generation(*args, **kwargs)  # type: ignore[misc]  # of a model
        self._columns = prepared[0].shape[1]
        return prepared

    def _begun(self, rows: int, capacity: int) -> Text:
        cache = self.run.make(rows, capacity)
        assert self.run.encode is not None
        self.run.encode(cache, self._inputs)
        return Text(cache)

    def _width(self, model_kwargs: Mapping[str, Any], generation_config: Any) -> int:
        return self._columns
