"""The driver of programs with an encoder.

transformers runs an encoder once per call and passes its output on. Here the cache stores the encoder's outputs with
its rows, and transformers passes on an empty tensor. The encoder runs when the cache is allocated, once for the rows
of a batch, however many beams each row has.

The first call of ``generate`` imports this module, as it does ``driver``.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.utils import GenerateEncoderDecoderOutput
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import ModelOutput

from lorac.argument_types import JsonMapping
from lorac.errors import Unavailable
from lorac.runtime.generation.driver import DecodingProgram, GenerationDriver
from lorac.runtime.generation.prompts import main_input
from lorac.runtime.traits import CustomGeneration

DECODER_MASK = "decoder_attention_mask"
"""transformers' name for the mask of a decoder's tokens."""


@final
class EncoderDecoderDriver(GenerationDriver):
    """The driver of a program with an encoder.

    Attributes:
        rules: the model's own class of generation; None for transformers' common ``generate``.
    """

    mask_name = DECODER_MASK
    output_class: Callable[..., ModelOutput] = GenerateEncoderDecoderOutput
    rules: CustomGeneration | None = None

    def __init__(self, program: DecodingProgram, config: JsonMapping, generation: JsonMapping) -> None:
        super().__init__(program, config, generation)
        if self.rules is not None:
            for target, values in ((self.config, config), (self.generation_config, generation)):
                vars(target).update({name: value for name, value in values.items() if not hasattr(target, name)})
            vars(self.config)["model_type"] = config.get("model_type", "")
            modules = SimpleNamespace()
            for path, value in self.rules.asks.items():
                (*above, last), module = path.split("."), modules
                for name in above:
                    module = vars(module).setdefault(name, SimpleNamespace())
                setattr(module, last, value)
            # Attributes that an artifact names must not replace the driver's own.
            vars(self).update({name: value for name, value in vars(modules).items() if not hasattr(self, name)})
        self.main_input_name = main_input(program.cache_spec.encodes)
        self._columns = 0
        # A model's own ``generate`` expects a cache of transformers'.
        self.returns_cache = self.rules is None

    def _validate_model_kwargs(self, model_kwargs: dict[str, object]) -> None:
        """Do nothing: the options were checked before."""

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self,
        inputs_tensor: Tensor,
        model_kwargs: dict[str, object],
        model_input_name: str | None,
        generation_config: GenerationConfig,
    ) -> dict[str, object]:
        """Record the encoder's inputs; return an empty encoder output for transformers to pass on."""
        given = {**model_kwargs, self.main_input_name: inputs_tensor}
        encodes = self.program.cache_spec.encodes
        self.encoder_inputs = {name: given[name] for name in encodes if given.get(name) is not None}
        empty = torch.empty(inputs_tensor.shape[0], 0, 0)
        return {**model_kwargs, "encoder_outputs": BaseModelOutput(last_hidden_state=empty)}

    def _prepare_decoder_input_ids_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_decoder_input_ids_for_generation(*args, **kwargs)  # type: ignore[misc]  # of a model
        self._columns = prepared[0].shape[1]
        return prepared

    def _beam_search(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._beam_search(*args, **kwargs)  # type: ignore[misc]  # of a model
        if self.rules is None or isinstance(output, Tensor):
            return output
        return type(output)(**{name: value for name, value in output.items() if name != "cache"})

    def prompt_width(self, model_kwargs: Mapping[str, object], generation_config: object) -> int:
        return self._columns


_ALLOWED_CLASSES = re.compile(r"transformers\.models\.\w+\.generation_\w+:[A-Za-z]\w*", re.ASCII)
"""Classes that an artifact may name: the generation mixins of transformers' own models."""


def load_rules_class(rules: CustomGeneration) -> type:
    """Import transformers' class that implements a model's own generation.

    Raises:
        Unavailable: transformers has no such class apart from the model.
    """
    module, _, name = rules.path.partition(":")
    found: object = None
    if _ALLOWED_CLASSES.fullmatch(rules.path):
        try:
            found = vars(importlib.import_module(module)).get(name)
        except ImportError:
            found = None
    if not isinstance(found, type) or not issubclass(found, GenerationMixin) or issubclass(found, nn.Module):
        raise Unavailable(
            f"the model generates by rules of its own ({name}), which only the model itself runs",
            next_step="compile with target='eager', or with cache=False for plain calls that return logits",
        )
    return found


def driver_class(rules: CustomGeneration | None) -> type[EncoderDecoderDriver]:
    """Return the driver class; with rules, it also inherits from the model's own class of generation."""
    if rules is None:
        return EncoderDecoderDriver
    return type(EncoderDecoderDriver.__name__, (EncoderDecoderDriver, load_rules_class(rules)), {"rules": rules})
