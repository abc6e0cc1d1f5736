"""X-LoRA's own folders: xlora_config.json and xlora_classifier.safetensors, with the experts in folders beside them.

Source: EricLBuehler/xlora (xlora_config.py, xlora_classifier.py, save_pretrained of xlora_insertion.py). The layers of
the classifier are ``inner.<j>``, where j counts ReLUs and dropouts too if there are any, and ``last``. ``adapters`` is
a list of the experts' names, or a mapping of names to paths, of which only the names matter. The authors' code can
normalise the weights that top-k keeps over the whole batch. lorac and PEFT normalise them per token, so a file with
that setting is refused.
"""

from collections.abc import Mapping
from pathlib import Path

from lorac.adapters.fit import check_adapter
from lorac.formats._config_fields import (
    Applied,
    Field,
    Irrelevant,
    Refused,
    read_fields,
    read_flag,
    read_size,
    write_json,
    write_sealed,
)
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.formats._format import Evidence, Format
from lorac.formats.peft.writer import seal_experts, seal_text, write_folder
from lorac.formats.peft.xlora_folder import CLASSIFIER_FIELDS, XLoraFolder, read_expert_paths, split_xlora
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.x_lora import XLoRA

CONFIG, WEIGHTS = "xlora_config.json", "xlora_classifier.safetensors"
_NESTED = "adapters"
"""The folder of the experts in folders of early versions."""
_PREFIX = "internal_xlora_classifier."


def read_expert_names(value: object) -> tuple[str, ...]:
    """Return the experts' names in order, from a list or from the older mapping of names to paths."""
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    return tuple(read_expert_paths(value))


_FIELDS: Mapping[str, Field] = {
    **CLASSIFIER_FIELDS,
    "adapters": Applied(read=read_expert_names),
    "enable_softmax_topk": Refused(
        False, next_step="train it again without; in the authors' code one token's weights depend on the whole batch"
    ),
    "hidden_size": Applied(4096, to="hidden_size", read=read_size),
    "enable_relu_and_dropout": Applied(True, to="activation", read=read_flag),
    "use_bias": Applied(True, read=read_flag),
    "base_model_id": Irrelevant(),
    "stop_token_id": Irrelevant(),
    "device": Irrelevant(),
    "model_id": Irrelevant(),
}


class XLoraFormat(Format):
    """The folders of X-LoRA's authors."""

    name = "xlora"
    looks_for = f"a folder with {CONFIG}"
    written_by = "X-LoRA's authors"
    evidence = Evidence.LAYOUT
    methods = (XLoRA,)

    def recognises(self, file: AdapterFile) -> bool:
        return file.folder_with(CONFIG, WEIGHTS).has(CONFIG)

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        folder = file.folder_with(CONFIG, WEIGHTS)
        config, weights = folder.inside(CONFIG), folder.inside(WEIGHTS)
        raw = config.read_json()
        values = read_fields(raw, _FIELDS, config.path)
        fields = {field.to: values[key] for key, field in _FIELDS.items() if field.to}
        if not folder.has(WEIGHTS):
            raise corrupt_error(
                f"'{folder}' has {CONFIG}, but no {WEIGHTS}", next_step="copy or download the whole folder"
            )
        tensors = weights.read_tensors()
        weights.check_seal(seal_text(raw, weights.metadata), tensors)
        classifier = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
        # A file with fewer layers than its configuration says is refused with an error on the first missing layer.
        keys = _layer_keys(min(fields["depth"], len(classifier) + 1), fields["activation"])
        experts = {expert: (f"{_NESTED}/{expert}", expert) for expert in values["adapters"]}
        contents = XLoraFolder(folder, experts, fields, classifier, keys, WEIGHTS, values["use_bias"])
        adapter = contents.read(name or folder.adapter_name, view)
        adapter.provenance["format"] = self.name
        return adapter

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write the two files, and the experts as PEFT's LoRAs in folders named by their numbers.

        Raises:
            FormatError: the adapter is not an X-LoRA, also replaces parameters of the model, or normalises the weights
                that top-k keeps.
            BaseNeeded: each site has its own weights, and no model is given.
        """
        variant = adapter.variant
        if not isinstance(variant, XLoRA) or adapter.replaced:
            fault = "also replaces parameters" if isinstance(variant, XLoRA) else f"is of {variant.name}"
            raise unsupported_error(
                f"adapter '{adapter.name}' {fault}, and the format '{self.name}' holds an X-LoRA and nothing else"
            )
        check_adapter(adapter, view)
        if variant.enable_softmax_topk:
            raise unsupported_error(
                f"adapter '{adapter.name}' normalises its top-k weights over each token, and the authors' code over "
                "the whole batch",
                next_step="use format='peft' or 'native'",
            )
        tensors, loras = split_xlora(adapter, view, _layer_keys(variant.depth, variant.activation))
        path.mkdir()
        for name, lora in loras.items():
            write_folder(lora, path / name, view)
        config = {key: getattr(variant, field.to) for key, field in _FIELDS.items() if field.to}
        config |= {"adapters": list(loras), "enable_softmax_topk": False, "use_bias": True, "base_model_id": ""}
        metadata = {"format": "pt", **seal_experts(path, loras)}
        write_sealed(path / WEIGHTS, tensors, metadata, seal_text(config, metadata))
        write_json(path / CONFIG, config)


def _layer_keys(depth: int, activation: bool) -> list[str]:
    """Return the key of each classifier layer's weight, in order."""
    return [*(f"inner.{(3 if activation else 1) * j}.weight" for j in range(depth - 1)), "last.weight"]
