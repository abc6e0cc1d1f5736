"""X-LoRA's own folders: xlora_config.json with xlora_classifier.safetensors, the experts in folders beside them.

Source: EricLBuehler/xlora (xlora_config.py, xlora_classifier.py). The classifier's layers but the last are
``inner.<j>``, j their places among ReLUs and dropouts where there are such, and ``last``. Where the authors normalise
what top-k leaves over the whole batch, lorac does over each token, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lorac.adapters.fit import check_adapter
from lorac.errors import FormatError, nearest_name, short
from lorac.formats._files import read_json, read_safetensors, write_json
from lorac.formats._format import Format
from lorac.formats._xlora import XLoraFolder, read_expert_paths, split_xlora
from lorac.formats.peft.config import flag, number, rank
from lorac.formats.peft.writer import write_folder
from lorac.frontend.model_view import ModelView
from lorac.storage.tensor_file import write_safetensors
from lorac.variants.adapter import Adapter
from lorac.variants.x_lora import XLoRA

CONFIG, WEIGHTS = "xlora_config.json", "xlora_classifier.safetensors"
_EXPERTS = "adapters"
_PREFIX = "internal_xlora_classifier."
_Reader = Callable[[Any], Any]


def _optional(value: Any) -> int | None:
    return None if value is None else rank(value)


_APPLIED: Mapping[str, tuple[str, Any, _Reader]] = {
    "hidden_size": ("hidden_size", 4096, rank),
    "enable_softmax": ("enable_softmax", True, flag),
    "enable_softmax_topk": ("enable_softmax_topk", False, flag),
    "layerwise_scalings": ("layerwise_scalings", False, flag),
    "xlora_depth": ("depth", 1, rank),
    "xlora_size": ("size", 2048, rank),
    "enable_relu_and_dropout": ("activation", False, flag),
    "xlora_dropout_p": ("dropout_p", 0.2, number),
    "use_trainable_adapters": ("use_trainable_adapters", False, flag),
    "softmax_temperature": ("softmax_temperature", 1.0, number),
    "top_k_lora": ("top_k_lora", None, _optional),
    "scaling_pass_value": ("scaling_pass_value", 0.0, number),
    "global_scaling_weight": ("global_scaling_weight", 1.0, number),
}
"""Field of the file -> the method's, its default, its reader."""
_ELSE: Mapping[str, Any] = {"adapters": {}, "use_bias": True}
_IRRELEVANT = frozenset({"base_model_id", "stop_token_id", "device", "model_id"})


def _recognises(path: Path) -> bool:
    return (_folder(path) / CONFIG).is_file()


def _folder(path: Path) -> Path:
    return path.parent if path.name in (CONFIG, WEIGHTS) and path.is_file() else path


def _load(path: Path, model: nn.Module | None, name: str | None) -> Adapter:
    folder = _folder(path)
    file = folder / CONFIG
    raw = read_json(file)
    _refuse_unknown(raw, file)
    fields = {own: _read(file, key, raw.get(key, default), read) for key, (own, default, read) in _APPLIED.items()}
    if not (folder / WEIGHTS).is_file():
        raise FormatError(
            f"'{folder}' has {CONFIG}, but no {WEIGHTS}",
            next_step="copy or download the whole folder",
            code="corrupt_file",
        )
    tensors, _ = read_safetensors(folder / WEIGHTS)
    keys = _keys(fields["depth"], fields["activation"])
    known = _read(file, "adapters", raw.get("adapters", {}), read_expert_paths)
    biased = _read(file, "use_bias", raw.get("use_bias", True), flag)
    plain = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
    found = XLoraFolder(folder, known, fields, plain, keys, biased)
    adapter = found.adapter(name or folder.resolve().name, model, (f"{_EXPERTS}/{{name}}", "{name}", "{path}"))
    adapter.provenance["format"] = FORMAT.name
    return adapter


def _save(adapter: Adapter, path: Path, model: nn.Module | None, target: Path) -> None:
    """Write the two files, and the experts as PEFT's LoRAs within ``adapters``.

    Raises:
        FormatError: it is no X-LoRA, or replaces parameters of the model besides.
        BaseNeeded: each site has weights of its own, and no model was given.
    """
    variant = adapter.variant
    if not isinstance(variant, XLoRA) or adapter.replaced:
        what = "replaces parameters besides" if isinstance(variant, XLoRA) else f"is of {variant.name}"
        raise FormatError(
            f"adapter '{adapter.name}' {what}, and the format '{FORMAT.name}' holds an X-LoRA and nothing else",
            next_step="use format='native'",
            code="unsupported_field",
        )
    if model is not None:
        check_adapter(adapter, ModelView.of(model))
    tensors, loras = split_xlora(adapter, model, _keys(variant.depth, variant.activation))
    path.mkdir()
    (path / _EXPERTS).mkdir()
    for name, lora in loras.items():
        write_folder(lora, path / _EXPERTS / name, model, target / _EXPERTS / name)
    config = {key: getattr(variant, own) for key, (own, _, _) in _APPLIED.items()}
    paths = {name: str(target / _EXPERTS / name) for name in loras}
    write_json(path / CONFIG, {**config, "adapters": paths, "use_bias": True, "base_model_id": ""})
    write_safetensors(path / WEIGHTS, tensors, {"format": "pt"})


def _keys(depth: int, activation: bool) -> list[str]:
    """Key of the weight of each layer of a classifier, in order."""
    stride = 3 if activation else 1
    return [*(f"inner.{stride * j}.weight" for j in range(depth - 1)), "last.weight"]


def _refuse_unknown(raw: Mapping[str, Any], file: Path) -> None:
    known = {*_APPLIED, *_ELSE, *_IRRELEVANT}
    for key in raw:
        if key not in known:
            raise FormatError(
                f"'{file}' sets the unknown field '{key}' = {short(raw[key])}",
                nearest=nearest_name(key, known),
                next_step="it may change the result, so it is not ignored",
                code="unknown_field",
            )


def _read(file: Path, key: str, value: Any, read: _Reader) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise FormatError(
            f"'{file}' sets {key}={short(value)}: {error}",
            next_step="save the configuration again with X-LoRA's own code",
            code="unsupported_field",
        ) from None


FORMAT = Format(
    name="xlora",
    looks_for=f"a folder with {CONFIG}",
    recognises=_recognises,
    load=_load,
    save=_save,
)
