"""LoRAs, DoRAs and (IA)³s as ``LoRAConfig`` has them: the way back from ``lorac.formats.adapterhub.loras``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorac.errors import FormatError
from lorac.formats.adapterhub.components import ComponentFile, ModelLayout
from lorac.formats.adapterhub.keys import KeyPattern
from lorac.formats.adapterhub.layouts import INTERMEDIATE, LETTERS, LORAS, OUTPUT, PACKED
from lorac.formats.adapterhub.loras import ARCHITECTURE, MAGNITUDE, SCALE, TASK_FIELDS, A, B, LoraFields, leaves
from lorac.ir.sites import Site
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.dora import DoRA
from lorac.variants.ia3 import IA3
from lorac.variants.lora import LoRA
from lorac.variants.split import Split

Tensor = torch.Tensor
_NATIVE = "use format='native'"


@dataclass(frozen=True)
class _LayerTerm:
    """What an adapter has at a layer: the fields that it needs, the parts that it adapts, and the file's tensors."""

    fields: LoraFields
    letters: tuple[str, ...]
    stored: Mapping[str, Tensor]


def written(adapter: Adapter, host: ModelLayout) -> ComponentFile:
    """What acts on layers' weights, as one configuration.

    Args:
        adapter: with the tensors of these alone.
        host: the model.

    Raises:
        FormatError: the library has no such method, or does not put one where the adapter has it.
    """
    terms = {path: _term(adapter, path, host) for path in adapter.tensors}
    groups = {term.fields for term in terms.values()}
    if len(groups) > 1:
        raise FormatError(
            f"AdapterHub has one rank, scale and dropout for all layers, and adapter '{adapter.name}' has "
            f"{len(groups)}",
            next_step=_NATIVE,
            code="unsupported_field",
        )
    return _written(_chosen(adapter.name, next(iter(groups)), terms, host), terms, host)


def _term(adapter: Adapter, path: str, host: ModelLayout) -> _LayerTerm:
    layer, site, at = host.layers.get(path), host.sites[path], adapter.tensors[path]
    here = adapter.variant.at(site)
    if layer is None:
        raise FormatError(
            f"AdapterHub adapts no layer that is '{path}', and adapter '{adapter.name}' has {here.name} there",
            next_step=_NATIVE,
            code="unsupported_field",
        )
    if layer.what != PACKED:
        fields, stored = _stored(adapter.name, here, site, at)
        return _LayerTerm(fields, (layer.what,) if layer.what in LETTERS else (), stored)
    return _packed(adapter.name, here, site, at)


def _packed(name: str, here: Variant, site: Site, at: Mapping[str, Tensor]) -> _LayerTerm:
    """The parts of a layer that packs several, their tensors beneath each other."""
    alike = isinstance(here, Split) and here.groups == 1 and tuple(here.among) == LETTERS
    shares = set(here.among.values()) if isinstance(here, Split) and isinstance(here.among, Mapping) else {1}
    methods = [here.parts[part] for part in LETTERS if part in here.parts] if isinstance(here, Split) else []
    if not isinstance(here, Split) or not alike or len(shares) > 1 or any(one != methods[0] for one in methods):
        raise FormatError(
            f"AdapterHub adapts {', '.join(LETTERS)} of '{site.path}' each by itself and all alike, and adapter "
            f"'{name}' does not",
            next_step=f"lorac.Split(parts={{'q': lorac.LoRA()}}) does; or {_NATIVE}",
            code="unsupported_field",
        )
    letters = tuple(part for part in LETTERS if part in here.parts)
    own = [{key.removeprefix(f"{part}_"): at[key] for key in at if key.startswith(f"{part}_")} for part in letters]
    told = [_stored(name, methods[0], site, tensors) for tensors in own]
    stored = {leaf: torch.cat([tensors[leaf] for _, tensors in told]) for leaf in told[0][1]}
    return _LayerTerm(replace(told[0][0], dropout=float(here.dropout)), letters, stored)


def _stored(name: str, method: Variant, site: Site, at: Mapping[str, Tensor]) -> tuple[LoraFields, dict[str, Tensor]]:
    """The fields of a method, and its tensors by leaf."""
    if isinstance(method, LoRA) and not method.lora_bias:
        alpha = method.scale * method.r if method.rslora else method.alpha
        fields = LoraFields(r=method.r, alpha=float(alpha), dropout=float(method.dropout))
        return fields, {A: at["lora_A"], B: at["lora_B"]}
    whole = site.bias is None and not site.transposed
    if isinstance(method, DoRA) and whole:  # the library's norm knows no scale
        fields = LoraFields(r=method.r, alpha=float(method.r), dropout=float(method.dropout), use_dora=True)
        up = at["lora_B"] if method.scale == 1 else at["lora_B"] * method.scale
        return fields, {A: at["lora_A"], B: up, MAGNITUDE: at["magnitude"][:, None]}
    if isinstance(method, IA3) and not method.feedforward:
        return LoraFields(r=1, alpha=1.0, composition_mode=SCALE, init_weights="ia3"), {B: at["ia3_l"]}
    raise FormatError(
        f"adapter '{name}' is of method '{method.name}' at '{site.path}', as AdapterHub's files, as lorac writes them, "
        "have none there: they hold bottlenecks, LoRA, (IA)^3 that scales outputs, and DoRA of layers without biases",
        next_step=f"lorac.to_lora(adapter) makes a LoRA of what is one; or {_NATIVE}",
        code="unsupported_field",
    )


def _chosen(name: str, fields: LoraFields, group: Mapping[str, _LayerTerm], host: ModelLayout) -> LoraFields:
    """The fields with those that make the library adapt the layers that are adapted."""
    layers = {path: host.layers[path] for path in group}
    letters = tuple(letter for letter in LETTERS if any(letter in term.letters for term in group.values()))
    kinds = {layer.what for layer in layers.values()}
    asked = replace(
        fields,
        selfattn_lora=bool(letters),
        attn_matrices=letters or fields.attn_matrices,
        intermediate_lora=INTERMEDIATE in kinds,
        output_lora=OUTPUT in kinds,
    )
    able = {layer.number for layer in host.layers.values() if asked.wants(layer)}
    asked = replace(asked, leave_out=tuple(sorted(able - {layer.number for layer in layers.values()})))
    whole = all(asked.letters(layers[path]) == term.letters for path, term in group.items() if term.letters)
    if {path for path, layer in host.layers.items() if asked.wants(layer)} != layers.keys() or not whole:
        raise FormatError(
            f"AdapterHub adapts layers of a kind in all of a block's attentions, or in its MLP, and adapter '{name}' "
            "does not",
            next_step=_NATIVE,
            code="unsupported_field",
        )
    return asked


def _written(fields: LoraFields, group: Mapping[str, _LayerTerm], host: ModelLayout) -> ComponentFile:
    stored = {path: {leaf: tensor.contiguous() for leaf, tensor in term.stored.items()} for path, term in group.items()}
    places = tuple(KeyPattern(LORAS, host.layers[path].place, leaves(fields), (path,)) for path in group)
    return ComponentFile(_config(fields, [tensor for at in stored.values() for tensor in at.values()]), places, stored)


def _config(fields: LoraFields, tensors: Iterable[Tensor]) -> dict[str, Any]:
    told: dict[str, Any] = {"architecture": ARCHITECTURE, **dataclasses.asdict(fields)}
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        told["dtype"] = str(dtypes.pop()).removeprefix("torch.")
    if fields.alpha.is_integer():
        told["alpha"] = int(fields.alpha)
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}
    return {name: value for name, value in listed.items() if name not in TASK_FIELDS}
