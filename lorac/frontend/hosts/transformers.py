"""Models of transformers, recognised without importing it."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor, nn
from torch.export import ExportedProgram

from lorac.errors import check_release
from lorac.frontend.copying import copy_structure
from lorac.frontend.host import Host
from lorac.frontend.inputs.example_inputs import describe_processor_call, make_example_inputs
from lorac.ir.calls.call import CAPTURE_CONFIG, OUTPUT_SWITCHES, Inputs
from lorac.ir.calls.multimodal_positions import POSITION_IDS, ROPE_METHOD, MultimodalPositions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRACE_CONFIG = CAPTURE_CONFIG | {"_experts_implementation": "batched_mm"}
"""Configuration fields during a trace: experts use ops that every target supports, not kernels for token groups."""
TIES = "tie_word_embeddings"
"""Configuration field: whether the input embedding and the output embedding are one tensor."""
_IDS = "input_ids"
_SEQUENCES = frozenset({_IDS, "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"})
_DECODER = "decoder_"
"""Prefix of the decoder's arguments in a model with an encoder."""
_TABLE = 2
"""Number of axes of token ids: rows, and sequence."""


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
        config = self.model.config  # None means the configuration's value
        switches = {name: getattr(config, name) for name in OUTPUT_SWITCHES if hasattr(config, name)}
        return super().defaults() | switches | CAPTURE_CONFIG

    def axes(self, name: str, value: Tensor, inputs: Inputs) -> dict[int, str]:
        """Name the sequence axis of inputs with such a name, or with one or more integers per token."""
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
        """The longest sequence that a table of positions admits; None if positions are computed (rotary)."""
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
        """Use transformers' exporter to find the tensors that forward reads as numbers, such as sizes of images."""
        (utils, _), prepared = _import_exporter(), dict(inputs)
        with contextlib.suppress(Exception):  # the exporter may fail for arguments that the model lacks
            utils.precompute_export_inputs(self.model, prepared)
        tensors = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        return {name: prepared[name] for name in tensors if not isinstance(prepared[name], Tensor)}

    def find_positions(self) -> MultimodalPositions | None:
        """Return the model's method, bound to a copy without weights."""
        model = self.model
        owner = next((one for one in (model, model.base_model) if hasattr(one, ROPE_METHOD)), None)
        if owner is None or POSITION_IDS not in self.parameters:
            return None
        # transformers' ``to`` refuses some quantised models.
        return MultimodalPositions(nn.Module.to(copy_structure(owner, share_buffers=True), "meta"))

    def trace(self, inputs: Any, shapes: Any) -> ExportedProgram:
        """Trace inside the contexts of transformers' exporter, which patch untraceable code of its models."""
        utils, exporter = _import_exporter()
        self.configure(TRACE_CONFIG)
        model, named, flags = utils.prepare_for_export(self.model, dict(inputs))
        exporter.register_cache_pytrees_for_model(model)
        # The exporter's ``apply_patches`` imports every model for which it has a patch, which takes most of a second.
        patches = []
        for path, name, patch in utils._PATCHES["dynamo"]:
            module, _, owner = path.rpartition(".")
            found = sys.modules.get(path) or vars(sys.modules.get(module, object)).get(owner)
            if found is not None:
                patches.append((found, name, patch))
        with (
            utils.patch_attributes(patches),
            exporter.reset_model_state(model),
            exporter.patch_model_config(model, flags),
            exporter.patch_forward_signature(model, named),
        ):
            return super().trace(copy.deepcopy(named), shapes)

    def configure(self, fields: Mapping[str, object]) -> Self:
        configs = [module.config for module in self.model.modules() if hasattr(module, "config")]
        for config, (name, value) in itertools.product(configs, fields.items()):
            if hasattr(config, name):
                setattr(config, name, value)
        return self

    def encoders(self) -> list[nn.Module]:
        return [self.model.get_encoder()] if getattr(self.model.config, "is_encoder_decoder", False) else []

    def record_untied_weights(self) -> None:
        """Update a copy's configuration to its weights, some of which were untied.

        If no weights are tied, ``tie_word_embeddings`` becomes False, which every reader of a checkpoint follows. The
        field does not change if the model's computation depends on it (Switch scales its outputs): transformers does
        not tie weights that a checkpoint stores under both names with different values.
        """
        model = self.model
        known = dict(model.named_parameters(remove_duplicate=False))
        declared = getattr(model, "all_tied_weights_keys", None)
        if declared is None:  # transformers 4 ties them again if the field is set, whatever a checkpoint stores
            field = getattr(model.config.get_text_config(decoder=True), TIES, True)
            alike = [name for name in model._tied_weights_keys or () if name in known and field]
            shared: Any = model.get_input_embeddings().weight if alike else None
            if any(known[name] is not shared and known[name].shape == shared.shape for name in alike):
                _check_release("a checkpoint of weights tied no longer", "5.0", "adapt all of the tied weights alike")
            return
        tied = {name: source for name, source in declared.items() if known[name] is known[source]}
        if len(tied) == len(declared):
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
        _check_release("a checkpoint with names of its own", "5.0", "save lorac.merge_into(…) by save_pretrained")
        from transformers.conversion_mapping import get_model_conversion_mapping

        return list(get_model_conversion_mapping(self.model))


HOST = TransformersHost


def find_stored_positions(config: Mapping[str, Any]) -> MultimodalPositions | None:
    """Return the positions method of a transformers model, built only from its configuration's entries."""
    from transformers.models.auto import CONFIG_MAPPING, MODEL_MAPPING

    kind = str(config.get("model_type"))
    cls: Any = MODEL_MAPPING.get(CONFIG_MAPPING[kind], None) if kind in CONFIG_MAPPING else None
    if not callable(getattr(cls, ROPE_METHOD, None)):
        return None
    owner: Any = cls.__new__(cls)
    nn.Module.__init__(owner)
    owner.config = cls.config_class.from_dict(dict(config))
    return MultimodalPositions(owner)


def require_graphs(purpose: str) -> None:
    """Raise ``Unavailable`` for releases of transformers that lack the exporter and generation that graphs need."""
    _check_release(purpose, "5.24", "compile with target='eager'")


def _check_release(purpose: str, needed: str, otherwise: str) -> None:
    found = sys.modules["transformers"].__version__
    check_release(purpose, "transformers", found, needed, otherwise=otherwise)


def _import_exporter() -> tuple[Any, Any]:
    """Return the two modules of transformers' exporter that are needed to trace."""
    require_graphs("capture for ONNX and TensorRT")
    from transformers.exporters import exporter_dynamo, utils

    return utils, exporter_dynamo
