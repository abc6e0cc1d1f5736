"""Writing LoRA, DoRA and (IA)³ as a ``LoRAConfig``: the inverse of ``lorac.formats.adapterhub.loras``."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorac.formats._errors import NATIVE, native_or_lora, unsupported_error
from lorac.formats.adapterhub.components import ComponentFile, ModelLayout
from lorac.formats.adapterhub.keys import KeyPattern
from lorac.formats.adapterhub.layouts import INTERMEDIATE, LETTERS, LORAS, OUTPUT, PACKED
from lorac.formats.adapterhub.loras import ARCHITECTURE, MAGNITUDE, SCALE, TASK_FIELDS, A, B, LoraFields, layer_leaves
from lorac.ir.sites.site import Site
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.dora import DoRA
from lorac.variants.entrywise import IA3
from lorac.variants.lora import LoRA
from lorac.variants.split import Split


@dataclass(frozen=True)
class _LayerTerm:
    """One layer's adapter: the fields that it requires, the adapted letters, and the tensors of the file."""

    fields: LoraFields
    letters: tuple[str, ...]
    stored: Mapping[str, Tensor]


def write_loras(adapter: Adapter, layout: ModelLayout) -> ComponentFile:
    """Convert an adapter of layers to one component of a file.

    Args:
        adapter: an adapter that has only the tensors of layers.

    Raises:
        FormatError: the library lacks the method, or cannot place it at exactly the adapter's sites.
    """
    terms: dict[str, _LayerTerm] = {}
    for path, stored in adapter.tensors.items():
        layer = layout.layers.get(path)
        if layer is None:
            raise unsupported_error(
                f"AdapterHub does not adapt '{path}', and adapter '{adapter.name}' ({adapter.variant.name}) does"
            )
        site = layout.view.sites[path]
        if layer.role == PACKED:
            terms[path] = _convert_packed(adapter.name, adapter.variant.at(site), site, stored)
        else:
            method, written = _convert_method(adapter.name, adapter.variant.at(site), site, stored)
            terms[path] = _LayerTerm(method, (layer.role,) if layer.role in LETTERS else (), written)
    groups = {term.fields for term in terms.values()}
    if len(groups) > 1:
        raise unsupported_error(
            f"AdapterHub has one rank, scale and dropout for all layers, and adapter '{adapter.name}' has {len(groups)}"
        )
    fields = _select_layers(adapter.name, groups.pop(), terms, layout)
    tensors = {
        path: {leaf: tensor.contiguous() for leaf, tensor in term.stored.items()} for path, term in terms.items()
    }
    leaves = layer_leaves(fields)
    patterns = tuple(KeyPattern(LORAS, layout.layers[path].name, leaves, (path,)) for path in terms)
    dtypes = {tensor.dtype for stored in tensors.values() for tensor in stored.values()}
    config: dict[str, object] = {"architecture": ARCHITECTURE}
    for name, value in dataclasses.asdict(fields).items():
        if name not in TASK_FIELDS:
            config[name] = list(value) if isinstance(value, tuple) else value
    if len(dtypes) == 1 and dtypes != {torch.float32}:
        config["dtype"] = str(dtypes.pop()).removeprefix("torch.")
    if fields.alpha.is_integer():
        config["alpha"] = int(fields.alpha)
    return ComponentFile(config, patterns, tensors)


def _convert_packed(name: str, split: Variant, site: Site, tensors: Mapping[str, Tensor]) -> _LayerTerm:
    """Concatenate the parts of a packed layer into one ``_LayerTerm``."""
    methods = [split.parts[part] for part in LETTERS if part in split.parts] if isinstance(split, Split) else []
    shares = set(split.among.values()) if isinstance(split, Split) and isinstance(split.among, Mapping) else {1}
    alike = len(shares) == 1 and all(method == methods[0] for method in methods)
    if not isinstance(split, Split) or split.groups > 1 or tuple(split.among) != LETTERS or not alike:
        raise unsupported_error(
            f"AdapterHub adapts {', '.join(LETTERS)} of '{site.path}' separately and by one method, and adapter "
            f"'{name}' does not",
            next_step=f"lorac.Split(parts={{'q': lorac.LoRA()}}) does; or {NATIVE}",
        )
    letters = tuple(part for part in LETTERS if part in split.parts)
    converted = []
    for part in letters:
        of_part = {key.removeprefix(f"{part}_"): t for key, t in tensors.items() if key.startswith(f"{part}_")}
        converted.append(_convert_method(name, methods[0], site, of_part))
    fields = replace(converted[0][0], dropout=float(split.dropout))
    stored = {leaf: torch.cat([part[leaf] for _, part in converted]) for leaf in converted[0][1]}
    return _LayerTerm(fields, letters, stored)


def _convert_method(
    name: str, method: Variant, site: Site, tensors: Mapping[str, Tensor]
) -> tuple[LoraFields, dict[str, Tensor]]:
    """Return the fields that describe a method, and its tensors by leaf."""
    if isinstance(method, LoRA) and not method.lora_bias:
        alpha = method.scale * method.r if method.rslora else method.alpha
        fields = LoraFields(r=method.r, alpha=float(alpha), dropout=float(method.dropout))
        return fields, {A: tensors["lora_A"], B: tensors["lora_B"]}
    # The library's norm omits the scale, so it is multiplied into B. Its DoRA also scales a bias, so none is allowed.
    if isinstance(method, DoRA) and site.bias is None and not site.transposed:
        fields = LoraFields(r=method.r, alpha=float(method.r), dropout=float(method.dropout), use_dora=True)
        up = tensors["lora_B"] if method.scale == 1 else tensors["lora_B"] * method.scale
        return fields, {A: tensors["lora_A"], B: up, MAGNITUDE: tensors["magnitude"][:, None]}
    if isinstance(method, IA3) and not method.feedforward and (method.scales_bias or site.bias is None):
        return LoraFields(r=1, alpha=1.0, composition_mode=SCALE, init_weights="ia3"), {B: tensors["ia3_l"]}
    raise unsupported_error(
        f"adapter '{name}' has '{method.name}' at '{site.path}', which lorac cannot write to AdapterHub's files: they "
        "hold bottlenecks, LoRA, (IA)^3 that scales outputs, and DoRA of layers without biases",
        next_step=native_or_lora(method),
    )


def _select_layers(name: str, fields: LoraFields, terms: Mapping[str, _LayerTerm], layout: ModelLayout) -> LoraFields:
    """Set the fields that make the library adapt exactly the adapted layers."""
    layers = {path: layout.layers[path] for path in terms}
    letters = tuple(letter for letter in LETTERS if any(letter in term.letters for term in terms.values()))
    roles = {layer.role for layer in layers.values()}
    fields = replace(
        fields,
        selfattn_lora=bool(letters),
        attn_matrices=letters or fields.attn_matrices,
        intermediate_lora=INTERMEDIATE in roles,
        output_lora=OUTPUT in roles,
    )
    blocks = {layer.block for layer in layout.layers.values() if fields.adapts(layer)}
    fields = replace(fields, leave_out=tuple(sorted(blocks - {layer.block for layer in layers.values()})))
    same_letters = all(fields.letters(layers[path]) == term.letters for path, term in terms.items() if term.letters)
    if not same_letters or {path for path, layer in layout.layers.items() if fields.adapts(layer)} != layers.keys():
        raise unsupported_error(
            f"AdapterHub adapts layers of a kind in all of a block's attentions, or in its MLP, and adapter '{name}' "
            "does not"
        )
    return fields
