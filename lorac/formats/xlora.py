"""X-LoRA's own folders: xlora_config.json with xlora_classifier.safetensors, the experts in folders next to them.

Source: EricLBuehler/xlora (xlora_config.py, xlora_classifier.py). The layers of the classifier but the last are
``inner.<j>``, j their positions among ReLUs and dropouts if there are any, and ``last``. Where the authors normalise
what top-k leaves over the whole batch, lorac does over each token, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorac.adapters.fit import check_adapter
from lorac.formats._config_fields import Applied, Field, Irrelevant, read_fields, read_flag, read_size
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.formats._files import containing_folder, read_json, read_safetensors, write_json
from lorac.formats._format import Format
from lorac.formats._xlora import CLASSIFIER_FIELDS, XLoraFolder, split_xlora
from lorac.formats.peft.writer import write_folder
from lorac.frontend.model_view import ModelView
from lorac.storage.tensor_file import write_safetensors
from lorac.variants.adapter import Adapter
from lorac.variants.x_lora import XLoRA

CONFIG, WEIGHTS = "xlora_config.json", "xlora_classifier.safetensors"
_EXPERTS = "adapters"
_PREFIX = "internal_xlora_classifier."
_FIELDS: Mapping[str, Field] = {
    **CLASSIFIER_FIELDS,
    "hidden_size": Applied(4096, to="hidden_size", read=read_size),
    "enable_relu_and_dropout": Applied(False, to="activation", read=read_flag),
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

    def recognises(self, path: Path) -> bool:
        return (containing_folder(path, CONFIG, WEIGHTS) / CONFIG).is_file()

    def read(self, path: Path, view: ModelView | None, name: str | None) -> Adapter:
        folder = containing_folder(path, CONFIG, WEIGHTS)
        values = read_fields(read_json(folder / CONFIG), _FIELDS, folder / CONFIG)
        fields = {field.to: values[key] for key, field in _FIELDS.items() if field.to}
        if not (folder / WEIGHTS).is_file():
            raise corrupt_error(
                f"'{folder}' has {CONFIG}, but no {WEIGHTS}", next_step="copy or download the whole folder"
            )
        tensors, _ = read_safetensors(folder / WEIGHTS)
        classifier = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
        keys = _layer_keys(fields["depth"], fields["activation"])
        contents = XLoraFolder(folder, values["adapters"], fields, classifier, keys, values["use_bias"])
        adapter = contents.read(name or folder.resolve().name, view, (f"{_EXPERTS}/{{name}}", "{name}", "{path}"))
        adapter.provenance["format"] = self.name
        return adapter

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write the two files, and the experts as PEFT's LoRAs within ``adapters``.

        Raises:
            FormatError: the adapter is not an X-LoRA, or also replaces parameters of the model.
            BaseNeeded: each site has weights of its own, and no model was given.
        """
        variant = adapter.variant
        if not isinstance(variant, XLoRA) or adapter.replaced:
            what = "also replaces parameters" if isinstance(variant, XLoRA) else f"is of {variant.name}"
            raise unsupported_error(
                f"adapter '{adapter.name}' {what}, and the format '{self.name}' holds an X-LoRA and nothing else",
                next_step="use format='native'",
            )
        if view is not None:
            check_adapter(adapter, view)
        tensors, loras = split_xlora(adapter, view, _layer_keys(variant.depth, variant.activation))
        path.mkdir()
        (path / _EXPERTS).mkdir()
        for name, lora in loras.items():
            write_folder(lora, path / _EXPERTS / name, view, target / _EXPERTS / name)
        config = {key: getattr(variant, field.to) for key, field in _FIELDS.items() if field.to}
        paths = {name: str(target / _EXPERTS / name) for name in loras}
        write_json(path / CONFIG, {**config, "adapters": paths, "use_bias": True, "base_model_id": ""})
        write_safetensors(path / WEIGHTS, tensors, {"format": "pt"})


def _layer_keys(depth: int, activation: bool) -> list[str]:
    """Return the key of the weight of each layer of a classifier, in order."""
    stride = 3 if activation else 1
    return [*(f"inner.{stride * j}.weight" for j in range(depth - 1)), "last.weight"]


FORMAT = XLoraFormat()
