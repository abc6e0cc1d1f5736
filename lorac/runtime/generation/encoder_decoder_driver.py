"""``EncoderDecoderDriver``: a program with an encoder beside a decoder, as transformers generates from it over a cache.

transformers runs an encoder once for a call, and hands on what it answers. Here what it makes is kept beside the rows
of the cache, so that transformers has nothing to hand on; and it is run when there is a cache, once for the rows of a
batch, however many beams each is to have.

As ``driver``, this module is imported by the first call of ``generate``.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation.utils import GenerateEncoderDecoderOutput
from transformers.modeling_outputs import BaseModelOutput

from lorac.errors import Unavailable
from lorac.runtime.generation.decoding_state import DecodingState
from lorac.runtime.generation.driver import DecodingProgram, GenerationDriver
from lorac.runtime.generation.prompts import main_input
from lorac.runtime.traits import CustomGeneration

DECODER_MASK = "decoder_attention_mask"
"""What transformers calls the mask of a decoder's text."""


@final
class EncoderDecoderDriver(GenerationDriver):
    """As ``GenerationDriver``, with an encoder.

    Args:
        run, config, generation: as ``GenerationDriver``'s.
    """

    mask_name = DECODER_MASK
    answers: Any = GenerateEncoderDecoderOutput

    rules: CustomGeneration | None = None

    def __init__(self, run: DecodingProgram, config: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
        super().__init__(run, config, generation)
        if self.rules is not None:
            _add_attributes(self, self.rules, config, generation)
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

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        answer: Any = super()._beam_search(*args, **kwargs)  # type: ignore[misc]  # of a model
        if self.rules is None or isinstance(answer, Tensor):
            return answer
        return type(answer)(**{name: value for name, value in answer.items() if name != "cache"})

    def _handed_on(self, text: DecodingState) -> DecodingState | None:
        """Rules of a model's own look into a cache, which they would not know."""
        return None if self.rules is not None else text

    def _begun(self, rows: int, capacity: int) -> DecodingState:
        cache = self.run.make(rows, capacity)
        assert self.run.encode is not None
        self.run.encode(cache, self._inputs)
        return DecodingState(cache)

    def _width(self, model_kwargs: Mapping[str, Any], generation_config: Any) -> int:
        return self._columns


# ── Rules of a model's own ───────────────────────────────────────────────────────────────────────────────────────────
_ALLOWED_CLASSES = re.compile(r"transformers\.models\.\w+\.generation_\w+:[A-Za-z]\w*", re.ASCII)
"""Classes that an artefact may name: those with which transformers' own models generate, and no model."""


def load_rules_class(rules: CustomGeneration) -> type:
    """The class that brings a way of generating.

    Raises:
        Unavailable: it is none of transformers' that can be had without its model.
    """
    module, _, name = rules.path.partition(":")
    found: Any = None
    if _ALLOWED_CLASSES.fullmatch(rules.path):
        try:
            found = vars(importlib.import_module(module)).get(name)
        except ImportError:
            found = None
    if not isinstance(found, type) or not issubclass(found, GenerationMixin) or issubclass(found, nn.Module):
        raise Unavailable(
            f"the model generates by rules of its own ({name}), which only the model itself runs",
            next_step="compile with target='eager'; a plain call, compiled(**inputs), answers logits",
        )
    return found


def driver_class(rules: CustomGeneration | None) -> type[EncoderDecoderDriver]:
    """The class of drivers that generate by some rules."""
    if rules is None:
        return EncoderDecoderDriver
    return type(EncoderDecoderDriver.__name__, (EncoderDecoderDriver, load_rules_class(rules)), {"rules": rules})


def _add_attributes(
    driver: EncoderDecoderDriver, rules: CustomGeneration, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> None:
    """Give a driver what rules ask of a model: all of its configurations, and attributes of its modules."""
    for held, told in ((driver.config, config), (driver.generation_config, generation)):
        vars(held).update({name: value for name, value in told.items() if not hasattr(held, name)})
    vars(driver.config)["model_type"] = config.get("model_type", "")
    modules = SimpleNamespace()
    for path, value in rules.asks.items():
        *above, last = path.split(".")
        setattr(functools.reduce(_child_namespace, above, modules), last, value)
    # What an artefact names takes the place of nothing that a driver has.
    vars(driver).update({name: held for name, held in vars(modules).items() if not hasattr(driver, name)})


def _child_namespace(held: Any, name: str) -> Any:
    """What stands for a module, made where there is nothing yet."""
    if not hasattr(held, name):
        setattr(held, name, SimpleNamespace())
    return getattr(held, name)
