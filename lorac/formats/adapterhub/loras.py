"""Methods on weights of layers: ``LoRAConfig``, which also covers DoRA, VeRA and (IA)³, and ``MTLLoRAConfig``.

Source: adapters.methods.lora of adapters 1.3.0. At a layer (out, in), s = alpha / r:

    ===========  ==========================================  =====================================================
    fields       tensors                                     y'
    ===========  ==========================================  =====================================================
    add          lora_A (r, in), lora_B (out, r)             y + s·B·A·x
    … use_dora   m.weight (out, 1) besides                   m/n ∘ (y + s·B·A·x), n the row norms of W + B·A
    … vera_d     vera_D (r, r), vera_B (out, out); shared    as these with vera_B·B and vera_D·A
                 lora_A (r, in), lora_B (out, r)
    scale        lora_B (out, 1)                             alpha·B ∘ y
    mtl_lora     lora_A (r, in), lora_B (n, out, r),         y + s·(Σ wᵢ·Bᵢ)·diag(values)·A·x,
                 task_specific.values (r,), weights (n,)     w = softmax(weights / weights_sharpness)
    ===========  ==========================================  =====================================================

A layer that packs queries, keys and values stores the tensors of its adapted parts concatenated by rows: lora_A (r·k,
in), lora_B (out/3·k, r). With composition "scale", alpha also multiplies the rows of the parts that are not adapted.
"""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.adapters.fit import check_parameter
from lorac.argument_types import Fields, JsonMapping, field_types
from lorac.formats._config_fields import check_field_type, refuse_unknown_fields
from lorac.formats._errors import unsupported_error
from lorac.formats.adapterhub.components import ComponentConfig, ConfigHeader, ModelLayout, PlacedComponent
from lorac.formats.adapterhub.keys import KeyPattern
from lorac.formats.adapterhub.layouts import INTERMEDIATE, LETTERS, LORAS, PACKED, SHARED, AdaptableLayer
from lorac.ir.sites.site import Site
from lorac.variants import initialisers
from lorac.variants.base import Variant, WeightVariant
from lorac.variants.dora import DoRA
from lorac.variants.entrywise import IA3
from lorac.variants.lora import LoRA
from lorac.variants.params import ParamSpec
from lorac.variants.split import Split

Stored = Mapping[str, Tensor]
ARCHITECTURE, TASKS_ARCHITECTURE = "lora", "mtl_lora"
ADD, SCALE = "add", "scale"
A, B, MAGNITUDE = "lora_A", "lora_B", "m.weight"
_VERA_A, _VERA_B, _TASK, _WEIGHTS = "vera_D", "vera_B", "task_specific.values", "weights"
TASK_FIELDS: JsonMapping = {
    "n_up_projection": 1,
    "task_specific_matrix_type": "singular_values",
    "weights_sharpness": 0.05,
}
"""Fields of ``MTLLoRAConfig`` alone, with its defaults."""


@dataclass(frozen=True)
class LoraFields:
    """The fields of ``LoRAConfig`` with its defaults; the last three belong to ``MTLLoRAConfig``.

    The fields for initialisation and dtype of the tensors have no effect in lorac.
    """

    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: tuple[int, ...] = ()
    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    attn_matrices: tuple[str, ...] = ("q", "v")
    composition_mode: str = ADD
    init_weights: str = "lora"
    init_weights_seed: int | None = None
    use_gating: bool = False
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None
    dtype: str | None = None
    n_up_projection: int | None = None
    task_specific_matrix_type: str | None = None
    weights_sharpness: float | None = None

    @property
    def scales(self) -> bool:
        """Whether the adapter multiplies outputs, instead of adding to them."""
        return self.composition_mode == SCALE

    @property
    def is_vera(self) -> bool:
        """Whether all layers share A and B."""
        return not self.scales and (self.vera_d is not None or self.vera_b is not None)

    @property
    def has_tasks(self) -> bool:
        """Whether the adapter weights several matrices B."""
        return self.n_up_projection is not None

    def letters(self, layer: AdaptableLayer) -> tuple[str, ...]:
        """Return the adapted letters of a layer; an empty tuple for a layer outside of attentions."""
        return tuple(letter for letter in LETTERS if letter in layer.role and letter in self.attn_matrices)

    def adapts(self, layer: AdaptableLayer) -> bool:
        """Return whether a layer is adapted."""
        if layer.block in self.leave_out:
            return False
        if layer.role in (*LETTERS, PACKED):
            return self.selfattn_lora and bool(self.letters(layer))
        return self.intermediate_lora if layer.role == INTERMEDIATE else self.output_lora

    def parts(self, layer: AdaptableLayer) -> tuple[str, ...]:
        """Return the adapted parts of a packed layer; with ``scales`` and alpha ≠ 1, all parts."""
        if layer.role != PACKED:
            return ()
        return LETTERS if self.scales and self.alpha != 1 else self.letters(layer)


def read_loras(config: JsonMapping, header: ConfigHeader, *, tasks: bool = False) -> ComponentConfig:
    """Parse a configuration of a method on layers.

    Args:
        tasks: whether the configuration is a ``MTLLoRAConfig``.

    Raises:
        FormatError: the library lacks a field, or lorac does not support its value.
    """
    known = [name for name in field_types(LoraFields) if tasks or name not in TASK_FIELDS]
    refuse_unknown_fields(config, known, header.file)
    given = {**(TASK_FIELDS if tasks else {}), **{name: value for name, value in config.items() if value is not None}}
    for name, value in given.items():
        check_field_type(LoraFields, name, value, header.file)
    values: Fields = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    fields = LoraFields(**values)
    scale, again = fields.alpha / max(fields.r, 1), "the library itself refuses it; save the adapter again"
    unknown = {*fields.attn_matrices} - {*LETTERS}
    refusals = [
        (
            fields.use_gating,
            "use_gating=True: a mean over each sequence weighs what is added, and no method does that at layers",
            "train it with use_gating=False",
        ),
        (fields.composition_mode not in (ADD, SCALE), f"composition_mode={fields.composition_mode!r}", again),
        (fields.r < 1, f"r={fields.r}", again),
        (bool(unknown), f"attn_matrices={list(fields.attn_matrices)}", f"it takes {', '.join(LETTERS)}"),
        (
            fields.scales and (fields.r > 1 or fields.dropout > 0 or fields.use_dora),
            f"composition_mode='{SCALE}' with r={fields.r}, dropout={fields.dropout:g}, use_dora={fields.use_dora}",
            again,
        ),
        (
            fields.use_dora and scale != 1,
            f"use_dora with alpha / r = {scale:g}, of which the library leaves the scale out of the norm",
            "train it with alpha = r, or with PEFT",
        ),
        (
            fields.task_specific_matrix_type not in (None, TASK_FIELDS["task_specific_matrix_type"]),
            f"task_specific_matrix_type={fields.task_specific_matrix_type!r}, which the library cannot make",
            f"train it with task_specific_matrix_type={TASK_FIELDS['task_specific_matrix_type']!r}",
        ),
    ]
    for refused, what, step in refusals:
        if refused:
            raise unsupported_error(f"'{header.file}' sets {what}", next_step=step)
    return functools.partial(_place_loras, fields)


def _place_loras(fields: LoraFields, layout: ModelLayout, name: str) -> PlacedComponent:
    """Apply a configuration to the layers of a model.

    Raises:
        FormatError: the library's result at a layer differs from lorac's.
    """
    layers = {path: layer for path, layer in layout.layers.items() if fields.adapts(layer)}
    for path, layer in layers.items():  # the library's result differs from lorac's there
        if layer.role == PACKED and (fields.is_vera or fields.has_tasks or fields.use_dora):
            raise unsupported_error(
                f"'{path}' packs {', '.join(LETTERS)}, and adapter '{name}' has VeRA, DoRA or weighed tasks there: "
                "the library cannot run that",
                next_step="train a plain LoRA, or with PEFT",
            )
        site = layout.view.sites[path]
        if fields.use_dora and (site.bias is not None or site.transposed):
            raise unsupported_error(
                f"adapter '{name}' has DoRA at '{path}': AdapterHub's scales the bias too, or the other side of the "
                "weight, and the DoRA of lorac and PEFT does not",
                next_step="train it with PEFT, whose DoRA lorac reads",
            )
    patterns = [KeyPattern(LORAS, layer.name, layer_leaves(fields), (path,)) for path, layer in layers.items()]
    if fields.is_vera:
        patterns.append(KeyPattern(SHARED, "", {A: A, B: B}, tuple(layers)))

    def convert(path: str, stored: Stored) -> dict[str, Tensor]:
        site, layer = layout.view.sites[path], layers[path]
        for leaf, shape in _leaf_shapes(fields, site, layer).items():
            check_parameter(name, leaf, ParamSpec(shape, initialisers.zeros), site, stored[leaf], shapes=True)
        return _to_parameters(fields, layer, stored)

    return PlacedComponent(_make_variants(fields, layers), tuple(patterns), convert)


def _make_variants(fields: LoraFields, layers: Mapping[str, AdaptableLayer]) -> tuple[Variant, ...]:
    """Return the methods of layers: one for packed layers, and one for all others."""
    dropout = float(fields.dropout)
    plain = tuple(path for path, layer in layers.items() if layer.role != PACKED)
    packed = tuple(path for path in layers if path not in plain)
    method: WeightVariant = IA3()
    if not fields.scales:
        method = (DoRA if fields.use_dora else LoRA)(r=fields.r, alpha=fields.alpha)
    variants: list[Variant] = []
    if packed:
        parts = dict.fromkeys(fields.parts(layers[packed[0]]), method)
        variants.append(Split(parts=parts, among=LETTERS, targets=packed, dropout=dropout))
    if plain or not packed:
        rate: Fields = {} if fields.scales else {"dropout": dropout}
        variants.append(dataclasses.replace(method, targets=plain, **rate))
    return tuple(variants)


def layer_leaves(fields: LoraFields) -> dict[str, str]:
    """Return leaf -> name, for the tensors that belong to one layer only."""
    leaves: tuple[str, ...] = (_VERA_A, _VERA_B) if fields.is_vera else (B,) if fields.scales else (A, B)
    leaves += (MAGNITUDE,) if fields.use_dora else ()
    leaves += (_TASK, _WEIGHTS) if fields.has_tasks else ()
    return {leaf: leaf for leaf in leaves}


def _leaf_shapes(fields: LoraFields, site: Site, layer: AdaptableLayer) -> dict[str, tuple[int, ...]]:
    """Return name -> shape, for all tensors that a layer's computation reads."""
    r, out, columns = fields.r, site.out_features, site.in_features
    if layer.role == PACKED:
        count = len(fields.letters(layer))
        packed: dict[str, tuple[int, ...]] = {B: (out // 3 * count, r)}
        return packed if fields.scales else packed | {A: (r * count, columns)}
    if fields.scales:
        return {B: (out, r)}
    shapes: dict[str, tuple[int, ...]] = {A: (r, columns), B: (out, r)}
    if fields.is_vera:
        shapes |= {_VERA_A: (r, r), _VERA_B: (out, out)}
    if fields.has_tasks:
        tasks = fields.n_up_projection or 1
        shapes |= {B: (tasks, out, r), _TASK: (r,), _WEIGHTS: (tasks,)}
    return shapes | ({MAGNITUDE: (out, 1)} if fields.use_dora else {})


def _to_parameters(fields: LoraFields, layer: AdaptableLayer, stored: Stored) -> dict[str, Tensor]:
    """Return lorac's parameters of a layer; where the library has more than two factors, multiply them."""
    if layer.role == PACKED:
        return _unpack(fields, layer, stored)
    if fields.scales:
        return {"ia3_l": _scale(stored[B], fields.alpha)}
    down, up = stored[A], stored[B]
    if fields.is_vera:
        down, up = _multiply(stored[_VERA_A], down), _multiply(stored[_VERA_B], up)
    if fields.weights_sharpness is not None:
        weights = torch.softmax(stored[_WEIGHTS].double() / fields.weights_sharpness, 0)
        up = (weights[:, None, None] * up).sum(0).to(up.dtype)
        down = stored[_TASK][:, None] * down
    parameters = {"lora_A": down, "lora_B": up}
    return parameters | ({"magnitude": stored[MAGNITUDE].flatten()} if fields.use_dora else {})


def _unpack(fields: LoraFields, layer: AdaptableLayer, stored: Stored) -> dict[str, Tensor]:
    """Split the tensors of a packed layer into parameters of its parts, under the names of ``Split``."""
    letters = fields.letters(layer)
    ups = dict(zip(letters, stored[B].chunk(len(letters)), strict=True))
    if fields.scales:
        ones = torch.ones_like(ups[letters[0]])
        return {f"{p}_ia3_l": _scale(ups.get(p, ones), fields.alpha).clone() for p in fields.parts(layer)}
    downs = dict(zip(letters, stored[A].chunk(len(letters)), strict=True))
    return {
        f"{part}_{name}": factors[part].clone()
        for part in letters
        for name, factors in (("lora_A", downs), ("lora_B", ups))
    }


def _scale(vector: Tensor, alpha: float) -> Tensor:
    return vector if alpha == 1 else vector * alpha


def _multiply(left: Tensor, right: Tensor) -> Tensor:
    return (left.double() @ right.double()).to(right.dtype)
