"""Readers of the model and adapter arguments of compile() and add_adapter(); their errors suggest a valid argument."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lorac.argument_types import describe_value
from lorac.errors import AdapterError, ChoiceError, CompileError, short
from lorac.formats.peft.objects import is_peft_config, unwrap_model, variant_from_config
from lorac.frontend.base_weights import check_values
from lorac.frontend.components import strip_wrappers
from lorac.ir.slots.choice import ChoiceSpec
from lorac.runtime.choice_switch import ChoiceSwitch
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

AdapterSource = str | Path | Adapter | Variant | Mapping[str, str | Path | Adapter]
"""A source of an adapter, as ``read_source`` returns it. For several models: name of the model -> path or adapter."""
NamedSource = tuple[str | None, AdapterSource]
"""(name of the adapter, or None if the caller gave none; source)."""
_ACCEPTED_SOURCES = "give a path, a method such as lorac.LoRA(r=8), a configuration of PEFT's, or a lorac.Adapter"
_TENSORS_ADVICE = "give the folder that PEFT saved it in, or lorac.Adapter(name, method, {site: {parameter: tensor}})"


@dataclass(frozen=True)
class ModelSource:
    """A model to compile, and the adapters of PEFT that were in it.

    Attributes:
        model: one model, or several by name, without layers of PEFT.
        adapters: the adapters of the layers of PEFT; empty if there are none.
        active: the choice that PEFT has active; ``"auto"`` for a model without layers of PEFT.
    """

    model: nn.Module | Mapping[str, nn.Module]
    adapters: tuple[NamedSource, ...] = ()
    active: ChoiceSpec = "auto"


def read_model(given: object) -> ModelSource:
    """Return the model to compile; split a model with layers of PEFT into its base and its adapters.

    Raises:
        CompileError: the value is not a model, or is compiled already; or its layers of PEFT have no configuration, or
            are merged or scaled.
        BaseNeeded: a tensor of the model has no values.
        FormatError: lorac does not read the type or the settings of an adapter of PEFT.
    """
    if isinstance(given, Mapping):
        return _read_several({name: _require_module(model, f"model '{name}'") for name, model in given.items()})
    model = _require_module(given, "the model")
    unwrapped = unwrap_model(model)
    if unwrapped is None:
        return ModelSource(model)
    base, adapters, active = unwrapped
    return ModelSource(base, tuple((one.name, one) for one in adapters), dict.fromkeys(active, 1.0) or None)


def _read_several(models: Mapping[str, nn.Module]) -> ModelSource:
    """Return the source of several models; adapters with the same name in several models become one adapter."""
    wrapped = {name: unwrapped for name, model in models.items() if (unwrapped := unwrap_model(model)) is not None}
    if not wrapped:
        return ModelSource(models)
    adapters: dict[str, dict[str, Adapter]] = {}
    for component, (_, own, _) in wrapped.items():
        for adapter in own:
            adapters.setdefault(adapter.name, {})[component] = adapter
    for name, parts in adapters.items():
        is_active = {component: name in wrapped[component][2] for component in parts}
        if len({*is_active.values()}) > 1:
            raise CompileError(
                f"adapter '{name}' is active only in {', '.join(c for c, on in is_active.items() if on)}",
                next_step="activate it in every model that has it, or in none",
            )
    active = {name: 1.0 for _, _, names in wrapped.values() for name in names}
    bases = {name: wrapped[name][0] if name in wrapped else model for name, model in models.items()}
    return ModelSource(bases, tuple(adapters.items()), active or None)


def _require_module(given: object, subject: str) -> nn.Module:
    """Return a model without the wrappers that do not change its computation; raises as ``check_values`` does."""
    if isinstance(getattr(given, "switch", None), ChoiceSwitch):
        raise CompileError(
            f"{subject} is compiled already",
            next_step="compile it again, with its present adapters, by compiled.export(target=...)",
        )
    if isinstance(given, nn.Module):
        inner = strip_wrappers(given)
        if inner is not given:
            return _require_module(inner, subject)
        check_values(given)
        return given
    raise CompileError(f"{subject} is {describe_value(given)}, not an nn.Module", next_step=_suggest_model(given))


def _suggest_model(given: object) -> str:
    """Return the next step of the error for a value that is not a model."""
    if isinstance(given, type):
        return f"give an instance of it: {given.__name__}(...)"
    if isinstance(given, str | os.PathLike):
        return "load it first: transformers.AutoModelForCausalLM.from_pretrained(...); lorac.load reads artifacts"
    if isinstance(given, torch.Tensor):
        return "give the model itself; for a state dict, load it into a model first: model.load_state_dict(...)"
    parts = getattr(given, "components", None)
    if isinstance(parts, Mapping):
        names = [name for name, part in parts.items() if isinstance(part, nn.Module)]
        by_name = ", ".join(f"'{name}': pipeline.{name}" for name in names)
        return f"give its models by name: {{{by_name}}}; lorac.diffusion.compile takes a pipeline of diffusers"
    if hasattr(given, "model_type"):
        return "make a model from this configuration: transformers.AutoModel.from_config(config)"
    return "give an nn.Module, or several by name"


def read_sources(given: object) -> list[NamedSource]:
    """Return the adapters to compile with: a dict by name, an iterable, or one adapter, as (name or None, source).

    Raises:
        AdapterError: one of the values cannot be an adapter.
    """
    if isinstance(given, Mapping):
        if given and all(isinstance(value, torch.Tensor) for value in given.values()):
            raise AdapterError(
                "adapters= is a dict of tensors, which does not name a method", next_step=_TENSORS_ADVICE
            )
        return [(name, read_source(value, str(name))) for name, value in given.items()]
    if isinstance(given, Iterable) and not isinstance(given, str | type | torch.Tensor):
        return [(None, read_source(value)) for value in given]
    return [(None, read_source(given))]


def read_source(given: object, name: str | None = None) -> AdapterSource:
    """Return the source of one adapter.

    Args:
        given: a path, a method without tensors (``lorac.LoRA(r=8)``), a configuration of PEFT, an adapter, or, for
            several models, name of the model -> path or adapter.
        name: name of the adapter, for messages.

    Raises:
        AdapterError: ``given`` is not one of these.
        FormatError: ``given`` is a configuration of PEFT with settings that lorac does not support.
    """
    if isinstance(given, str | Adapter | Variant):
        return given
    if isinstance(given, os.PathLike):
        return Path(given)
    if is_peft_config(given):
        return variant_from_config(given)
    subject = "an adapter" if name is None else f"adapter '{name}'"
    if isinstance(given, type) and issubclass(given, Variant):
        raise AdapterError(
            f"{subject} is the class {given.__name__}", next_step=f"give an instance: {given.__name__}()"
        )
    if isinstance(given, Mapping) and given and not any(isinstance(part, torch.Tensor) for part in given.values()):
        return {component: _read_part(part, f"{subject} for '{component}'") for component, part in given.items()}
    if isinstance(given, Mapping):
        raise AdapterError(f"{subject} is a dict, which does not name its method", next_step=_TENSORS_ADVICE)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str):
        raise AdapterError(f"{subject} is a pair", next_step=f"give a dict: adapters={{{given[0]!r}: ...}}")
    raise AdapterError(f"{subject} cannot be {short(given)}", next_step=_ACCEPTED_SOURCES)


def _read_part(given: object, subject: str) -> str | Path | Adapter:
    if isinstance(given, str | os.PathLike):
        return Path(given)
    if isinstance(given, Adapter):
        return given
    raise AdapterError(
        f"{subject} is {describe_value(given)}",
        next_step="give a path or a lorac.Adapter for each component; a fresh method is given once, for all of them",
    )


def check_argument_order(source: object, name: object) -> None:
    """Raise ``ChoiceError`` if ``add_adapter`` is given the name first."""
    if isinstance(source, str) and name is not None and not isinstance(name, str):
        raise ChoiceError(
            f"add_adapter takes the adapter first, and {source!r} seems to be its name",
            next_step=f"write add_adapter(..., name={source!r})",
        )
