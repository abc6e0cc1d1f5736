"""``merge_into``: a model of the same class with adapters merged into its weights."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import Tensor, nn

from lorac.errors import AdapterError, ChoiceError
from lorac.formats import load_adapter
from lorac.frontend.components import Components, check_component, list_components
from lorac.frontend.copying import separate_layers
from lorac.frontend.host import Host
from lorac.frontend.model_view import ModelView
from lorac.frontend.quantised_weights import dequantise_weights, settle_dequantised_weights
from lorac.ir.slots.choice import Choice, ChoiceSpec, parse_choice
from lorac.merging.merged_weights import MergedWeights
from lorac.merging.stored_model import find_kept_ties
from lorac.session.adapter_loading import join_components
from lorac.session.api import Adapters
from lorac.session.request.sources import NamedSource, read_model, read_sources
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

ModelT = TypeVar("ModelT", bound=nn.Module)


@overload
def merge_into(
    model: ModelT, adapters: Adapters = ..., active: ChoiceSpec = ..., *, dequantize: bool = ...
) -> ModelT: ...
@overload
def merge_into(
    model: Mapping[str, nn.Module], adapters: Adapters = ..., active: ChoiceSpec = ..., *, dequantize: bool = ...
) -> dict[str, nn.Module]: ...
def merge_into(
    model: nn.Module | Mapping[str, nn.Module],
    adapters: Adapters = (),
    active: ChoiceSpec = "auto",
    *,
    dequantize: bool = False,
) -> nn.Module | dict[str, nn.Module]:
    """Return a model of the same class with adapters merged into its weights; the result does not need lorac.

    W becomes W + Σ t·(W' − W) over the active adapters, computed in float32 or wider and rounded once to the model's
    dtype. The given model does not change: the result has new tensors where adapters changed them, and shares all other
    tensors with it. ``save_pretrained`` writes the result as a checkpoint; ``lorac merge`` writes one without loading
    the model.

    Where an adapter changes one of several layers that share a weight (tied embeddings), the layers are untied, and the
    configuration says so; a warning names them.

    Args:
        model: an nn.Module, or several by name. For a PeftModel, its base; its active adapters are merged if no others
            are given.
        adapters: paths or Adapters, by name or as a list, as ``lorac.compile`` takes them.
        active: a name or {name: strength}, as ``swap`` takes it. ``"auto"``: the only adapter, at strength 1.
        dequantize: whether to merge into the float values of weights that bitsandbytes or torchao quantised. The whole
            result is then in floating point.

    Returns:
        The merged model, or a dict of merged models by name.

    Raises:
        CompileError: an adapter is not a change of weights, or a weight is quantised or computed at each call.
        ChoiceError: there are several adapters, and ``active`` chooses none.
        AdapterError, SiteError, FormatError: an adapter does not fit the model, or a merged value is too large.
    """
    source = read_model(model)
    named = read_sources(adapters)
    module = Components(source.model) if isinstance(source.model, Mapping) else source.model
    if dequantize:
        module = dequantise_weights(module)
    view = ModelView.of(module)
    given = read_adapters(named or source.adapters, view)
    choice = choose_active(source.active if active == "auto" and not named else active, given)
    merged = _install(view.module, MergedWeights(view, given, choice))
    if dequantize:
        settle_dequantised_weights(merged)
        for component in list_components(merged).values():
            Host.of(component).forget_quantisation()
    return dict(merged.items()) if isinstance(merged, Components) else merged


def read_adapters(sources: Iterable[NamedSource], view: ModelView | None) -> dict[str, Adapter]:
    """Read trained adapters from their sources; return them by name.

    Args:
        view: the model; None: files are read without a model.

    Raises:
        AdapterError: two adapters have one name, or a source is a method without tensors.
        ChoiceError: an adapter is for a component that the model does not have.
    """
    found: dict[str, Adapter] = {}
    for name, source in sources:
        if isinstance(source, Variant):
            raise AdapterError(
                f"{type(source).__name__} is a method without trained tensors, which changes nothing",
                next_step="give the path of a trained adapter, or a lorac.Adapter",
            )
        if isinstance(source, Mapping):
            parts = {}
            for part, one in source.items():
                component = None if view is None else view.components[check_component(part, view.components)]
                parts[part] = _read(one, None if component is None else ModelView.of(component), name)
            adapter = join_components(parts, name or next(iter(parts.values())).name)
        else:
            adapter = _read(source, view, name)
        key = name or adapter.name
        if key in found:
            raise AdapterError(
                f"two adapters are called '{key}'",
                next_step="name them: adapters={'one': ..., 'other': ...}",
                code="adapter_exists",
            )
        found[key] = adapter
    return found


def _read(source: str | Path | Adapter, view: ModelView | None, name: str | None) -> Adapter:
    return source if isinstance(source, Adapter) else load_adapter(source, view, name)


def choose_active(active: ChoiceSpec, adapters: Mapping[str, Adapter]) -> Choice:
    """Return the adapters to merge, with their strengths.

    Raises:
        ChoiceError: there are several adapters, and ``active`` is "auto"; or ``active`` chooses none.
    """
    names = list(adapters)
    if active == "auto" and len(names) != 1:
        raise ChoiceError(
            f"merging needs a choice among the adapters {', '.join(sorted(names))}" if names else "nothing is merged",
            next_step=f"give active=, as swap() takes it: {dict.fromkeys(sorted(names) or ['name'], 1.0)}",
        )
    choice = parse_choice(names[0] if active == "auto" else active, names)
    if not choice:
        raise ChoiceError("no adapter is active, so nothing is merged", next_step="give active= a strength above 0")
    return choice


def _install(model: ModelT, merged: MergedWeights) -> ModelT:
    """Copy a model: merged tensors are new, and all other tensors are shared."""
    copied: Any = Host.of(model).copy().model
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(flags[name])
    owners = dict.fromkeys(name.rpartition(".")[0] for name in merged if "." in name)
    separate_layers(copied, owners, merging=True)
    values: dict[str, Tensor] = {}
    for name, value in merged.items():
        values[name] = nn.Parameter(value, requires_grad=flags[name]) if name in flags else value
    for first, *others in find_kept_ties(model, values):
        values |= {name: values[first] for name in others}
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        module = copied.get_submodule(owner)
        tensors: dict[str, Any] = module._buffers if leaf in module._buffers else module._parameters
        tensors[leaf] = value
    for component in list_components(copied).values():
        Host.of(component).record_untied_weights()
    return copied
