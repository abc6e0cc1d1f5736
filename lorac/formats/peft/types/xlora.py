"""PEFT type XLORA: several LoRAs, mixed by a classifier.

Source: peft.tuners.xlora of PEFT 0.21 (config.py, classifier.py, layer.py). The file has only the classifier, as
``base_model.internal_xlora_classifier.layers.<j>.weight`` and ``bias``, where j counts layers, ReLUs and dropouts. The
experts are in folders of their own, named by ``adapters``; PEFT resolves their paths from the working directory. PEFT
reads a whole classifier, though it may save only a part of one.
"""

from collections.abc import Mapping

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, read_size
from lorac.formats._errors import unsupported_error
from lorac.formats.peft.fields import WITHOUT_FAN
from lorac.formats.peft.peft_type import PeftType, Tensors
from lorac.formats.peft.writer import WEIGHTS
from lorac.formats.peft.xlora_folder import CLASSIFIER_FIELDS, XLoraFolder, split_xlora
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.x_lora import XLoRA

_OF_MODULES = frozenset({"modules_to_save", "target_modules"})
_CLASSIFIER = "base_model.internal_xlora_classifier.layers."


def read_hidden_size(value: object) -> int:
    """Return the width of the hidden state; PEFT takes null for 4096."""
    return 4096 if value is None else read_size(value)


class XloraType(PeftType[XLoRA]):
    """XLORA."""

    peft_type = "XLORA"
    variants = {XLoRA: {}}
    fields = {
        **{name: field for name, field in WITHOUT_FAN.items() if name not in _OF_MODULES},
        "hidden_size": Applied(to="hidden_size", read=read_hidden_size),
        **CLASSIFIER_FIELDS,
    }

    def read_folder(
        self, folder: AdapterFile, values: JsonMapping, tensors: Tensors, name: str, view: ModelView | None
    ) -> Adapter:
        # A file with fewer layers than its configuration says is refused with an error on the first missing layer.
        keys = _layer_keys(min(values["xlora_depth"], len(tensors) + 1), values["xlora_dropout_p"])
        fields = {field.to: values[key] for key, field in self.fields.items() if field.to}
        experts = {expert: (path, expert) for expert, path in values["adapters"].items()}
        return XLoraFolder(folder, experts, fields, tensors, keys, WEIGHTS).read(name, view)

    def write_folder(self, adapter: Adapter, view: ModelView | None) -> tuple[Tensors, Mapping[str, Adapter]]:
        """Return the whole classifier, and the experts by number, in the order in which PEFT activates them.

        Raises:
            FormatError: the adapter's classifier lacks the ReLUs that PEFT has between layers.
            BaseNeeded: each layer has its own weights, so PEFT's numbers of layers depend on the model.
        """
        variant = adapter.variant
        assert isinstance(variant, XLoRA)
        if variant.depth > 1 and not variant.activation:
            raise unsupported_error(
                f"the classifier of adapter '{adapter.name}' has nothing between its layers, and PEFT's has ReLUs"
            )
        return split_xlora(adapter, view, _layer_keys(variant.depth, variant.dropout_p))


def _layer_keys(depth: int, dropout: float) -> list[str]:
    """Return the key of each classifier layer's weight, in order."""
    return [f"{_CLASSIFIER}{(3 if dropout > 0 else 2) * j}.weight" for j in range(depth)]
