"""PEFT's objects in memory: a configuration as a fresh method, a wrapped model as its base and its adapters.

Both go the way of files, written into a folder that is gone afterwards, so that what is refused of a file is refused of
an object, in the same words. PEFT is only asked for where the caller has loaded it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorac.errors import CompileError, FormatError, short
from lorac.formats import load_adapter
from lorac.formats.peft.config import COMMON, peft_type_of, read_config, variant_of
from lorac.formats.peft.peft_type import FieldUse, PeftType
from lorac.formats.peft.writer import CONFIG
from lorac.frontend.copying import copy_structure
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task -> the heads that PEFT trains whole with an adapter for it (peft.peft_model)."""
_DEFAULT = "default"
_BASES: weakref.WeakKeyDictionary[nn.Module, list[nn.Module]] = weakref.WeakKeyDictionary()
"""Wrapped model -> the bases made of it, which whoever compiles again asks for: they live as long as it does."""


def _class(module: str, name: str) -> tuple[type, ...]:
    """A class of PEFT's as ``isinstance`` takes it; nothing where PEFT is not loaded, for then there is no instance."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)


# ── Configurations ───────────────────────────────────────────────────────────────────────────────────────────────────
def is_peft_config(value: object) -> bool:
    """Whether a value is a configuration of PEFT's, such as a ``LoraConfig``."""
    return isinstance(value, _class("peft.config", "PeftConfig"))


def variant_from_config(config: Any) -> Variant:
    """The fresh method that a configuration of PEFT's describes.

    Raises:
        FormatError: it sets what lorac does not build, or how PEFT starts an adapter.
    """
    where = Path(type(config).__name__)
    raw = json.loads(json.dumps(config.to_dict(), default=sorted))
    method = peft_type_of(raw, where)
    values = read_config(raw, method, where)
    if raw.get("target_modules") is None and not raw.get("target_parameters"):
        raise FormatError(
            f"'{where}' names no target_modules, and what PEFT then takes depends on the model",
            next_step="name them: target_modules=['q_proj', 'v_proj']",
            code="unsupported_field",
        )
    _refuse_unstarted(raw, method, where)
    variant = variant_of(values, method, where)
    heads = [name for name in _HEADS.get(str(raw.get("task_type")), ()) if name not in variant.modules_to_save]
    return dataclasses.replace(variant, modules_to_save=(*variant.modules_to_save, *heads)) if heads else variant


def _refuse_unstarted(raw: Mapping[str, Any], method: PeftType, where: Path) -> None:
    """Refuse what of a file says how it was trained, and of a fresh adapter how it would start."""
    for name, field in method.fields.items():
        picks = any(name in chosen and chosen[name] == raw.get(name) for chosen in method.variants.values())
        told = name in COMMON or picks or field.to is not None or field.use is FieldUse.IRRELEVANT
        if not told and raw.get(name, field.default) not in (field.default, None):
            raise FormatError(
                f"'{where}' sets {name}={short(raw[name])}, which says how PEFT makes or trains an adapter, and lorac "
                "does it in its own way",
                next_step="leave it out; or have get_peft_model make the adapter, and give the PeftModel",
                code="unsupported_field",
            )


# ── Models ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class UnwrappedModel:
    """What a wrapped model is made of.

    Attributes:
        base: the model without PEFT's layers: a copy over the same weights.
        adapters: its adapters, by PEFT's names for them.
        active: the names of those that are on.
    """

    base: nn.Module
    adapters: tuple[Adapter, ...]
    active: tuple[str, ...]


def unwrap_model(model: nn.Module) -> UnwrappedModel | None:
    """What a ``PeftModel`` is made of; None for a model that PEFT has not touched.

    Args:
        model: left as it was.

    Raises:
        CompileError: PEFT's layers are in a model that is no ``PeftModel``, or adapters are merged into the base.
        FormatError: an adapter is of a type, or set in a way, that lorac does not read.
    """
    if not isinstance(model, _class("peft.peft_model", "PeftModel")):
        refuse_peft_layers(model)
        return None
    given: Any = model
    for name, config in given.peft_config.items():
        peft_type_of({"peft_type": str(config.peft_type.value)}, Path(name))
    _refuse_merged(given)
    base: nn.Module = copy_structure(given).unload()
    refuse_peft_layers(base)
    _BASES.setdefault(given, []).append(base)
    with tempfile.TemporaryDirectory(prefix="lorac-") as folder:
        # Left alone, PEFT asks the hub whether embeddings have grown; here they are in the base, as they are.
        given.save_pretrained(folder, save_embedding_layers=False)
        places = {name: Path(folder) / ("" if name == _DEFAULT else name) for name in given.peft_config}
        for place in places.values():
            _forget_start(place)
        adapters = tuple(load_adapter(place, base, name) for name, place in places.items())
    active = given.active_adapters
    return UnwrappedModel(base, adapters, tuple(active() if callable(active) else active))


def _forget_start(place: Path) -> None:
    """Take out of a file how its adapter began: the base beside it is in memory, rewritten already where it was."""
    file = place / CONFIG
    raw = json.loads(file.read_text())
    raw.pop(peft_type_of(raw, file).start, None)
    file.write_text(json.dumps(raw))


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """PEFT's layers in a model, with their paths."""
    layer = _class("peft.tuners.tuners_utils", "BaseTunerLayer")
    return ((path, module) for path, module in model.named_modules() if isinstance(module, layer))


def refuse_peft_layers(model: nn.Module) -> None:
    """Refuse a model with layers of PEFT's, which are no places to adapt.

    Raises:
        CompileError: naming the first of them, and what to give instead.
    """
    path = next((path for path, _ in _layers(model)), None)
    if path is not None:
        raise CompileError(
            f"the model has PEFT's layers in it, at '{path}' first: it is no base any more",
            next_step="save the adapters, model.save_pretrained(folder), and give the model as it is loaded without "
            "them: lorac.compile(base, [folder])",
        )


def _refuse_merged(model: Any) -> None:
    path = next((path for path, layer in _layers(model) if layer.merged), None)
    if path is not None:
        raise CompileError(
            f"adapters are merged into the base's weight at '{path}'", next_step="call model.unmerge_adapter() first"
        )
