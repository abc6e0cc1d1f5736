"""Models of transformers, recognised without importing it."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from torch.export import ExportedProgram

from lorac.frontend.copying import copy_structure
from lorac.frontend.host import Host
from lorac.frontend.inputs.example_inputs import describe_processor_call, make_example_inputs
from lorac.ir.calls.call import Inputs
from lorac.ir.calls.fixed_arguments import CAPTURE_CONFIG, OUTPUT_SWITCHES
from lorac.ir.calls.multimodal_positions import POSITION_IDS, ROPE_METHOD, MultimodalPositions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRACE_CONFIG = CAPTURE_CONFIG | {"_experts_implementation": "batched_mm"}
"""Fields set during a trace: experts are multiplied by ops that every target has, not by kernels for token groups."""

TIES = "tie_word_embeddings"
"""Field of a configuration: whether the input's and the output's embedding are one tensor."""
_IDS = "input_ids"
_SEQUENCES = frozenset({_IDS, "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"})
_DECODER = "decoder_"
"""Prefix of the arguments of a decoder that has an encoder."""
_TABLE = 2
"""Axes of token ids: rows, and the sequence along each."""


class TransformersHost(Host):
    """A model of transformers."""

    model: PreTrainedModel
    has_sequences = True
    by_name = True

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        transformers = sys.modules.get("transformers")
        return transformers is not None and isinstance(model, transformers.PreTrainedModel)

    def example_inputs(self) -> dict[str, Any]:
        inputs = make_example_inputs(self)
        if inputs is None:
            raise self.require_inputs(describe_processor_call(self))
        return inputs

    def defaults(self) -> dict[str, object]:
        config = self.model.config  # there None means the value in the configuration
        switches = {name: getattr(config, name) for name in OUTPUT_SWITCHES if hasattr(config, name)}
        return super().defaults() | switches | CAPTURE_CONFIG

    def axes(self, name: str, value: Tensor, inputs: Inputs) -> dict[int, str]:
        """Name the axis along a sequence: of inputs with such a name, or with one or several integers per token."""
        if value.dim() < _TABLE:
            return {}
        plain = name.removeprefix(_DECODER)
        size = "length" if plain == name else f"{_DECODER}length"
        ids = inputs.get(name.replace(plain, _IDS))
        if isinstance(ids, Tensor) and not value.is_floating_point():
            if value.dim() > _TABLE and value.shape[-_TABLE:] == ids.shape:
                return {value.dim() - _TABLE: "batch", value.dim() - 1: size}
            if value.shape[:_TABLE] == ids.shape:
                return {1: size}
        return {1: size} if plain in _SEQUENCES else {}

    def count_rows(self, inputs: Inputs) -> int | None:
        tables = (value for name, value in inputs.items() if name.removeprefix(_DECODER) == _IDS)
        return next((ids.shape[0] for ids in tables if isinstance(ids, Tensor) and ids.dim() == _TABLE), None)

    @property
    def longest(self) -> int | None:
        """The longest sequence that a table of positions admits; None where positions are computed (rotary)."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        named = (m for path, m in self.model.named_modules() if re.search(r"(^|\.)(wpe|\w*position\w*)$", path))
        tensors = (
            tensor
            for module in named
            for tensor in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
        )
        return limit if any(tensor.dim() == _TABLE and tensor.is_floating_point() for tensor in tensors) else None

    @property
    def generates(self) -> bool:
        return self.model.can_generate()

    def find_number_inputs(self, inputs: Inputs) -> dict[str, object]:
        """Find the tensors that forward reads as numbers, such as sizes of images, by transformers' exporter."""
        from transformers.exporters.utils import precompute_export_inputs

        prepared = dict(inputs)
        with contextlib.suppress(Exception):  # it may fail on arguments that the model does not have
            precompute_export_inputs(self.model, prepared)
        tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        return {name: prepared[name] for name in tensors if not isinstance(prepared[name], Tensor)}

    def find_positions(self) -> MultimodalPositions | None:
        """Return the model's own method on a copy without weights."""
        model = self.model
        owner = next((one for one in (model, model.base_model) if hasattr(one, ROPE_METHOD)), None)
        if owner is None or POSITION_IDS not in self.parameters:
            return None
        copied = copy_structure(owner, share_buffers=True)
        for module in copied.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = None if parameter is None else nn.Parameter(parameter.to("meta"), False)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to("meta")
        return MultimodalPositions(copied)

    def trace(self, inputs: Any, shapes: Any) -> ExportedProgram:
        """Trace through transformers' exporter, which patches code of its models that does not trace; no caches."""
        from transformers.exporters.configs import DynamoConfig
        from transformers.exporters.exporter_dynamo import DynamoExporter

        # Without tested_versions it warns at every export that torch is newer than the tested one.
        exporter: Any = type("Exporter", (DynamoExporter,), {"tested_versions": {}})()
        self.configure(TRACE_CONFIG)
        program: ExportedProgram
        with _patch_imported_models_only():
            program, _ = exporter.export_program(self.model, dict(inputs), DynamoConfig(dynamic_shapes=shapes))
        return program

    def configure(self, fields: Mapping[str, object]) -> Self:
        configs = [module.config for module in self.model.modules() if hasattr(module, "config")]
        for config, (name, value) in itertools.product(configs, fields.items()):
            if hasattr(config, name):
                setattr(config, name, value)
        return self

    def encoders(self) -> list[nn.Module]:
        return [self.model.get_encoder()] if getattr(self.model.config, "is_encoder_decoder", False) else []

    def record_untied_weights(self) -> None:
        """Make the configuration of a copy agree with its weights, some of which are tied no longer.

        Where none is tied, ``tie_word_embeddings`` becomes False, which every reader of a checkpoint goes by. It stays
        as it is where the model computes by it (Switch scales its outputs): transformers does not tie weights that a
        checkpoint holds under both names with different values.
        """
        model = self.model
        known = dict(model.named_parameters(remove_duplicate=False))
        tied = {name: source for name, source in model.all_tied_weights_keys.items() if known[name] is known[source]}
        if len(tied) == len(model.all_tied_weights_keys):
            return
        model.all_tied_weights_keys = tied
        fields = {**model.config.to_dict(), TIES: False}
        forwards = {inspect.unwrap(type(module).forward) for module in model.modules()}
        computes = type(model.config).from_dict(fields).to_dict() != fields or any(
            TIES in forward.__code__.co_names for forward in forwards if inspect.isfunction(forward)
        )
        if not tied and not computes:
            self.configure({TIES: False})

    def forget_quantisation(self) -> None:
        quantizer = getattr(self.model, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(self.model)

    def checkpoint_changes(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping

        changes: list[Any] = get_model_conversion_mapping(self.model)
        return changes


HOST = TransformersHost


@contextlib.contextmanager
def _patch_imported_models_only() -> Iterator[None]:
    """Make transformers' exporter patch imported models only, in this context.

    It imports every model that it has a patch for, which takes most of a second. Unnecessary once it looks these models
    up among those that are imported.
    """
    from transformers.exporters import utils

    import_anything = utils.import_dotted_path

    def import_if_loaded(path: str, missing_ok: bool = False) -> object:
        module = ".".join(path.split(".")[: len(_A_MODELS_MODULE)])
        absent = _own_trace.get() and path.startswith(_MODELS) and module not in sys.modules
        return None if absent and missing_ok else import_anything(path, missing_ok)

    utils.import_dotted_path = import_if_loaded
    token = _own_trace.set(True)
    try:
        yield
    finally:
        _own_trace.reset(token)
        utils.import_dotted_path = import_anything


_own_trace: ContextVar[bool] = ContextVar("own_trace", default=False)
_A_MODELS_MODULE = ("transformers", "models", "model", "module")
_MODELS = ".".join(_A_MODELS_MODULE[:2]) + "."
