"""PEFT's objects in memory: a configuration becomes a fresh variant, a wrapped model becomes a base and adapters.

Both are written to a temporary folder and read from it, so an object raises the same errors as a file. lorac uses PEFT
only where the caller has imported it.
"""

import dataclasses
import json
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from lorac.errors import CompileError, short
from lorac.formats._config_fields import Irrelevant, read_fields
from lorac.formats._errors import unsupported_error
from lorac.formats._registry import load_adapter
from lorac.formats.peft.config import peft_type_of, variant_of
from lorac.formats.peft.fields import COMMON
from lorac.formats.peft.keys import PREFIX
from lorac.formats.peft.writer import CONFIG, WEIGHTS
from lorac.frontend.host import Host
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

PeftObject = Any
"""An object of PEFT's, which may not be installed and has no types."""
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task -> the heads that PEFT trains whole with an adapter for it (peft.peft_model)."""
_DEFAULT = "default"
_BASES: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = weakref.WeakKeyDictionary()
"""Wrapped model -> the bases made of it. They live as long as it does, so that a base is known when it is met again."""


def _find_class(module: str, name: str) -> tuple[type, ...]:
    """Return a class of PEFT's as a tuple for ``isinstance``; empty where PEFT is not imported."""
    cls = getattr(sys.modules.get(module), name, None)
    return () if cls is None else (cls,)


def is_peft_config(value: object) -> bool:
    """Return whether a value is a PEFT configuration, such as a ``LoraConfig``."""
    return isinstance(value, _find_class("peft.config", "PeftConfig"))


def variant_from_config(config: PeftObject) -> Variant:
    """Return the fresh variant that a PEFT configuration describes.

    Raises:
        FormatError: the configuration sets a field that lorac does not support, or PEFT's initialisation of an adapter.
    """
    path = Path(type(config).__name__)
    raw = json.loads(json.dumps(config.to_dict(), default=sorted))
    peft_type = peft_type_of(raw, path)
    values = read_fields(raw, peft_type.fields, path)
    if "target_modules" not in peft_type.fields:
        raise unsupported_error(
            f"'{path}' is of peft_type {peft_type.peft_type}, and only PEFT can initialise that",
            next_step="have get_peft_model make the adapter, and give the PeftModel",
        )
    if raw.get("target_modules") is None and not raw.get("target_parameters"):
        raise unsupported_error(
            f"'{path}' names no target_modules, and PEFT's choice of them depends on the model",
            next_step="name them: target_modules=['q_proj', 'v_proj']",
        )
    for name, field in peft_type.fields.items():
        selections = peft_type.variants.values()
        selects = any(name in selection and selection[name] == raw.get(name) for selection in selections)
        is_known = (
            name in COMMON or selects or field.to is not None or isinstance(field, Irrelevant) or not field.written
        )
        # A fresh adapter would not follow a field that changes PEFT's training or initialisation alone.
        if not is_known and raw.get(name, field.default) not in (field.default, None):
            raise unsupported_error(
                f"'{path}' sets {name}={short(raw[name])}, which only PEFT's own initialisation and training read",
                next_step="leave it out; or have get_peft_model make the adapter, and give the PeftModel",
            )
    variant = variant_of(values, peft_type, path)
    heads = [name for name in _HEADS.get(str(raw.get("task_type")), ()) if name not in variant.modules_to_save]
    return dataclasses.replace(variant, modules_to_save=(*variant.modules_to_save, *heads)) if heads else variant


def unwrap_model(model: nn.Module) -> tuple[nn.Module, tuple[Adapter, ...], tuple[str, ...]] | None:
    """Return the base, the adapters and the names of the active ones of a model; None if it has no layers of PEFT.

    The base is a copy of the model without PEFT's layers, and shares the weights.

    The layers come from a ``PeftModel``, or from diffusers or transformers, which inject them into their own models.

    Raises:
        CompileError: the model has no configurations of its layers, or an adapter is merged or scaled.
        FormatError: lorac does not read an adapter's type, or one of its settings.
    """
    is_wrapped = isinstance(model, _find_class("peft.peft_model", "PeftModel"))
    if not is_wrapped and next(_iterate_peft_layers(model), None) is None:
        return None
    if not hasattr(model, "peft_config"):
        _refuse_peft_layers(model)
    wrapped: PeftObject = model
    for name, config in wrapped.peft_config.items():
        peft_type_of({"peft_type": str(config.peft_type.value)}, Path(name))
    path = next((path for path, layer in _iterate_peft_layers(wrapped) if layer.merged), None)
    if path is not None:
        raise CompileError(
            f"adapters are merged into the base's weight at '{path}'", next_step="call model.unmerge_adapter() first"
        )
    base = _copy_base(wrapped, is_wrapped=is_wrapped)
    _BASES.setdefault(wrapped, []).append(base)
    with tempfile.TemporaryDirectory(prefix="lorac-") as root:
        if is_wrapped:
            # By default PEFT asks the hub whether embeddings were resized; here the base keeps its embeddings.
            wrapped.save_pretrained(root, save_embedding_layers=False)
        else:  # in the form that a ``PeftModel`` writes
            read: PeftObject = sys.modules["peft"].get_peft_model_state_dict
            for name, config in wrapped.peft_config.items():
                folder = Path(root) / ("" if name == _DEFAULT else name)
                config.save_pretrained(str(folder))
                tensors = read(wrapped, adapter_name=name, save_embedding_layers=False)
                save_file({f"{PREFIX}{key}": tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS)
        folders = {name: Path(root) / ("" if name == _DEFAULT else name) for name in wrapped.peft_config}
        for folder in folders.values():
            # Where an adapter's initialisation rewrites the base, the base in memory is already rewritten.
            config_path = folder / CONFIG
            raw = json.loads(config_path.read_text(encoding="utf-8"))
            raw.pop(peft_type_of(raw, config_path).start_field, None)
            config_path.write_text(json.dumps(raw), encoding="utf-8")
        view = ModelView.of(base)
        adapters = tuple(load_adapter(folder, view, name) for name, folder in folders.items())
    active = wrapped.active_adapters if is_wrapped else _injected_names(wrapped)
    return base, adapters, tuple(active() if callable(active) else active)


def _copy_base(wrapped: PeftObject, *, is_wrapped: bool) -> nn.Module:
    """Return a copy of a model with the base's modules in place of PEFT's, which shares the weights."""
    copied: PeftObject = Host.of(wrapped).copy().model
    # For modules that adapters save whole, PEFT's own unwrapping would keep the active adapter's copy.
    wrappers = _find_class("peft.utils.other", "ModulesToSaveWrapper")
    found: list[tuple[str, PeftObject]] = [(path, m) for path, m in copied.named_modules() if isinstance(m, wrappers)]
    for path, wrapper in found:
        owner, _, leaf = path.rpartition(".")
        setattr(copied.get_submodule(owner), leaf, wrapper.original_module)
    if is_wrapped:
        copied = copied.get_base_model() if copied.active_peft_config.is_prompt_learning else copied.unload()
    else:
        for path, layer in list(_iterate_peft_layers(copied)):
            copied.set_submodule(path, layer.get_base_layer())
    _refuse_peft_layers(copied)
    base: nn.Module = copied
    return base


def _injected_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's active injected adapters; refuse an adapter whose strength was changed."""
    active: set[str] = set()
    for path, layer in _iterate_peft_layers(model):
        for name, scaling in getattr(layer, "scaling", {}).items():
            rank = layer.r[name] ** (0.5 if layer.use_rslora.get(name) else 1)
            if scaling != layer.lora_alpha[name] / rank:
                raise CompileError(
                    f"adapter '{name}' has a strength other than 1 at '{path}'",
                    next_step=f"set it to 1 first, pipeline.set_adapters('{name}'); lorac's is set by swap()",
                )
        active |= set() if layer.disable_adapters else set(layer.active_adapters)
    return tuple(sorted(active))


def _iterate_peft_layers(model: nn.Module) -> Iterator[tuple[str, PeftObject]]:
    """Return an iterator over the paths and modules of PEFT's layers in a model."""
    layer = _find_class("peft.tuners.tuners_utils", "BaseTunerLayer")
    return ((path, module) for path, module in model.named_modules() if isinstance(module, layer))


def _refuse_peft_layers(model: nn.Module) -> None:
    """Refuse a model with PEFT's layers but without a peft_config."""
    path = next((path for path, _ in _iterate_peft_layers(model)), None)
    if path is not None:
        raise CompileError(
            f"the model has PEFT's layers in it, at '{path}' first, and no peft_config that describes them",
            next_step="give the PeftModel, or the model without the layers: lorac.compile(base, [folder])",
        )
