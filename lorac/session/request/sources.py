"""What people hand in, as the compiler takes it: the one place that knows what else it may be, and says so in words."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lorac.errors import AdapterError, ChoiceError, CompileError, OptionError, short
from lorac.formats.peft.objects import is_peft_config, refuse_peft_layers, unwrap_model, variant_from_config
from lorac.ir.slots.choice import ChoiceSpec
from lorac.runtime.switchable_model import SwitchableModel
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

AdapterSource = str | Path | Adapter | Variant
"""What an adapter can be given as, once ``source_of`` has looked at it."""
NamedSource = tuple[str | None, AdapterSource]
_ACCEPTED_SOURCES = "give a path, a method such as lorac.LoRA(r=8), a configuration of PEFT's, or a lorac.Adapter"
_TENSORS_ADVICE = "give the folder that PEFT saved it in, or lorac.Adapter(name, method, {site: {parameter: tensor}})"


@dataclass(frozen=True)
class ModelSource:
    """A model to compile, and what came with it.

    Attributes:
        model: one model, or several by name.
        adapters: those that a PeftModel brought along.
        active: what was on in it; ``"auto"`` where nothing is said.
    """

    model: nn.Module | Mapping[str, nn.Module]
    adapters: tuple[NamedSource, ...] = ()
    active: ChoiceSpec = "auto"


def read_model(given: object) -> ModelSource:
    """The model to compile; a ``PeftModel`` is its base and its adapters.

    Raises:
        CompileError: it is no model, is compiled already, or PEFT's layers are where they cannot be taken out.
    """
    if isinstance(given, Mapping):
        for name, model in given.items():
            refuse_peft_layers(_require_module(model, f"model '{name}'"))
        return ModelSource(given)
    model = _require_module(given, "the model")
    parts = unwrap_model(model)
    if parts is None:
        return ModelSource(model)
    adapters = tuple((adapter.name, adapter) for adapter in parts.adapters)
    return ModelSource(parts.base, adapters, dict.fromkeys(parts.active, 1.0) or None)


def _require_module(given: object, what: str) -> nn.Module:
    if isinstance(given, SwitchableModel):
        raise CompileError(
            f"{what} is compiled already",
            next_step="compiled.export(target=...) compiles it again, with its adapters as they are now",
        )
    if isinstance(given, nn.Module):
        return given
    if isinstance(given, type):
        step = f"give an instance of it: {given.__name__}(...)"
    elif isinstance(given, str | os.PathLike):
        step = "load it first: transformers.AutoModelForCausalLM.from_pretrained(...); lorac.load reads artefacts"
    else:
        step = "give an nn.Module, or several by name"
    raise CompileError(f"{what} is {short(given)}, which is no nn.Module", next_step=step)


def read_sources(given: object) -> list[NamedSource]:
    """The adapters to compile with, and the names that they were given by.

    Raises:
        AdapterError: something among them is no adapter.
    """
    if isinstance(given, Mapping):
        if given and all(isinstance(value, torch.Tensor) for value in given.values()):
            raise AdapterError(
                "adapters= is a dict of tensors, which does not say of what method", next_step=_TENSORS_ADVICE
            )
        return [(name, read_source(value, str(name))) for name, value in given.items()]
    if isinstance(given, Iterable) and not isinstance(given, str | type | torch.Tensor):
        return [(None, read_source(value)) for value in given]
    return [(None, read_source(given))]


def read_source(given: object, name: str | None = None) -> AdapterSource:
    """One adapter.

    Args:
        given: a path, a fresh method, a configuration of PEFT's, or an adapter.
        name: what it is called, for the message.

    Raises:
        AdapterError: it is none of these.
        FormatError: a configuration that lorac does not build.
    """
    if isinstance(given, str | Adapter | Variant):
        return given
    if isinstance(given, os.PathLike):
        return Path(given)
    if is_peft_config(given):
        return variant_from_config(given)
    what = "an adapter" if name is None else f"adapter '{name}'"
    if isinstance(given, type) and issubclass(given, Variant):
        raise AdapterError(f"{what} is the class {given.__name__}", next_step=f"give an instance: {given.__name__}()")
    if isinstance(given, Mapping):
        raise AdapterError(f"{what} is a dict, which does not say of what method it is", next_step=_TENSORS_ADVICE)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str):
        raise AdapterError(f"{what} is a pair", next_step=f"give a dict: adapters={{{given[0]!r}: ...}}")
    raise AdapterError(f"{what} is {short(given)}, which is none", next_step=_ACCEPTED_SOURCES)


def check_argument_order(source: object, name: object) -> None:
    """Raise ``ChoiceError`` where ``add_adapter`` is given the name first."""
    if isinstance(source, str) and name is not None and not isinstance(name, str):
        raise ChoiceError(
            f"add_adapter takes the adapter first, and {source!r} seems to be its name",
            next_step=f"write add_adapter(..., name={source!r})",
        )


def parse_device(given: str | torch.device | None) -> torch.device | None:
    """A device by its name, whether or not it is there.

    Raises:
        OptionError: it is no name of a device.
    """
    try:
        return None if given is None else torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise _unusable_device(given, error) from error


def check_device(device: torch.device | None) -> None:
    """Refuse a device that torch does not have here.

    Raises:
        OptionError: this torch cannot use it.
    """
    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _unusable_device(device, error) from error


def _unusable_device(given: object, error: Exception) -> OptionError:
    reason = str(error).strip().partition("\n")[0]
    return OptionError(
        f"device={str(given)!r} cannot be used here: {reason}",
        nearest="cpu",
        next_step="leave device= out to stay where the model is; 'cuda' takes a GPU, and torch built for it",
    )
