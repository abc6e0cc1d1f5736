"""What acts on layers' weights: ``LoRAConfig``, of which DoRA, VeRA and (IA)³ are settings, and ``MTLLoRAConfig``.

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

A layer that packs queries, keys and values has the tensors of the chosen ones beneath each other: lora_A (r·k, in),
lora_B (out/3·k, r); with scale, alpha multiplies the rows of those that are not chosen, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorac.adapters.fit import check_parameter
from lorac.argument_types import field_types, format_type, matches_type
from lorac.errors import FormatError, short
from lorac.formats.adapterhub.components import ConfigHeader, ModelLayout, PlacedComponent, refuse_unknown
from lorac.formats.adapterhub.keys import KeyPattern
from lorac.formats.adapterhub.layouts import LETTERS, LORAS, PACKED, SHARED, AdaptableLayer
from lorac.ir.sites import Site
from lorac.variants import initialisers
from lorac.variants.base import Variant, WeightVariant
from lorac.variants.dora import DoRA
from lorac.variants.ia3 import IA3
from lorac.variants.lora import LoRA
from lorac.variants.params import ParamSpec
from lorac.variants.split import Split

Tensor = torch.Tensor
Stored = Mapping[str, Tensor]
ARCHITECTURE, OF_TASKS = "lora", "mtl_lora"
ADD, SCALE = "add", "scale"
A, B, MAGNITUDE = "lora_A", "lora_B", "m.weight"
_VERA_A, _VERA_B, _TASK, _WEIGHTS = "vera_D", "vera_B", "task_specific.values", "weights"
TASK_FIELDS: Mapping[str, Any] = {
    "n_up_projection": 1,
    "task_specific_matrix_type": "singular_values",
    "weights_sharpness": 0.05,
}
"""Fields of ``MTLLoRAConfig`` alone, with its defaults."""


@dataclass(frozen=True)
class LoraFields:
    """``LoRAConfig``'s by their names, with its defaults; the last three are ``MTLLoRAConfig``'s.

    What tensors were drawn from, and their dtype, which they tell themselves, are for the library's next start.
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
        """Whether outputs are multiplied, and nothing is added."""
        return self.composition_mode == SCALE

    @property
    def vera(self) -> bool:
        """Whether A and B are all layers' own."""
        return not self.scales and (self.vera_d is not None or self.vera_b is not None)

    @property
    def of_tasks(self) -> bool:
        """Whether several B are weighed."""
        return self.n_up_projection is not None

    def letters(self, layer: AdaptableLayer) -> tuple[str, ...]:
        """Which of queries, keys and values a layer has; none where it is another, or not chosen."""
        return tuple(letter for letter in LETTERS if letter in layer.what and letter in self.attn_matrices)

    def wants(self, layer: AdaptableLayer) -> bool:
        """Whether a layer is adapted."""
        attends = layer.what in (*LETTERS, PACKED)
        chosen = self.selfattn_lora and bool(self.letters(layer)) if attends else getattr(self, f"{layer.what}_lora")
        return bool(chosen) and layer.number not in self.leave_out

    def parts(self, layer: AdaptableLayer) -> tuple[str, ...]:
        """Which parts of a layer that packs several are adapted; with scale, alpha changes the others, too."""
        if layer.what != PACKED:
            return ()
        return LETTERS if self.scales and self.alpha != 1 else self.letters(layer)


def read(given: Mapping[str, Any], told: ConfigHeader, *, tasks: bool = False) -> LoraComponent:
    """A configuration.

    Args:
        given: its fields.
        told: what stands around it.
        tasks: whether it is ``MTLLoRAConfig``.

    Raises:
        FormatError: a field that the library does not have.
        FormatError: a value that lorac does not build.
    """
    refuse_unknown(given, [name for name in field_types(LoraFields) if tasks or name not in TASK_FIELDS], told.file)
    chosen = {**(TASK_FIELDS if tasks else {}), **{name: value for name, value in given.items() if value is not None}}
    for name, value in chosen.items():
        if not matches_type(value, field_types(LoraFields)[name]):
            kind = format_type(field_types(LoraFields)[name])
            raise FormatError(
                f"'{told.file}' sets {name}={short(value)}", next_step=f"it takes {kind}", code="unsupported_field"
            )
    listed: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()
    }
    fields = LoraFields(**listed)
    for refused, what, step in _refusals(fields):
        if refused:
            raise FormatError(f"'{told.file}' sets {what}", next_step=step, code="unsupported_field")
    return LoraComponent(fields)


def _refusals(fields: LoraFields) -> list[tuple[bool, str, str]]:
    """(whether a value is not built, what it is, what to do instead)."""
    scale, again = fields.alpha / max(fields.r, 1), "the library itself refuses it; save the adapter again"
    strange = sorted({*fields.attn_matrices} - {*LETTERS})
    return [
        (
            fields.use_gating,
            "use_gating=True: a mean over each text weighs what is added, which no method of layers does here",
            "train it with use_gating=False",
        ),
        (fields.composition_mode not in (ADD, SCALE), f"composition_mode={fields.composition_mode!r}", again),
        (fields.r < 1, f"r={fields.r}", again),
        (bool(strange), f"attn_matrices={list(fields.attn_matrices)}", f"it takes {', '.join(LETTERS)}"),
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


@dataclass(frozen=True)
class LoraComponent:
    """A configuration as it was read."""

    fields: LoraFields

    def placed(self, host: ModelLayout, name: str) -> PlacedComponent:
        """The factors, or scales, of an adapter at a model's layers.

        Raises:
            FormatError: a layer is one at which the library computes what lorac does not.
        """
        chosen = {path: layer for path, layer in host.layers.items() if self.fields.wants(layer)}
        for path, layer in chosen.items():
            self._refuse(name, host.sites[path], layer)
        places = [KeyPattern(LORAS, layer.place, leaves(self.fields), (path,)) for path, layer in chosen.items()]
        if self.fields.vera:
            places.append(KeyPattern(SHARED, "", {A: A, B: B}, tuple(chosen)))

        def made(path: str, stored: Stored) -> dict[str, Tensor]:
            site, layer = host.sites[path], chosen[path]
            for leaf, shape in _shapes(self.fields, site, layer).items():
                check_parameter(name, leaf, ParamSpec(shape, initialisers.zeros), site, stored[leaf], shapes=True)
            return _made(self.fields, layer, stored)

        return PlacedComponent(self._variants(chosen), tuple(places), made)

    def _variants(self, chosen: Mapping[str, AdaptableLayer]) -> tuple[Variant, ...]:
        method, rate = self._method(), float(self.fields.dropout)
        plain = tuple(path for path, layer in chosen.items() if layer.what != PACKED)
        packed = tuple(path for path in chosen if path not in plain)
        found: list[Variant] = []
        if packed:
            parts = dict.fromkeys(self.fields.parts(chosen[packed[0]]), method)
            found.append(Split(parts=parts, among=LETTERS, targets=packed, dropout=rate))
        if plain or not packed:
            dropout: dict[str, Any] = {} if self.fields.scales else {"dropout": rate}
            found.append(dataclasses.replace(method, targets=plain, **dropout))
        return tuple(found)

    def _method(self) -> WeightVariant:
        if self.fields.scales:
            return IA3()
        return (DoRA if self.fields.use_dora else LoRA)(r=self.fields.r, alpha=self.fields.alpha)

    def _refuse(self, name: str, site: Site, layer: AdaptableLayer) -> None:
        fields = self.fields
        if layer.what == PACKED and (fields.vera or fields.of_tasks or fields.use_dora):
            raise FormatError(
                f"adapter '{name}' has VeRA, DoRA or weighed tasks at '{site.path}', which packs {', '.join(LETTERS)}: "
                "the library itself cannot run that",
                next_step="train a plain LoRA, or with PEFT",
                code="unsupported_field",
            )
        if fields.use_dora and (site.bias is not None or site.transposed):
            raise FormatError(
                f"adapter '{name}' has DoRA at '{site.path}': AdapterHub's scales the layer's bias as well, or a "
                "transposed weight along its other side, and lorac's, as PEFT's, does not",
                next_step="train it with PEFT, whose DoRA lorac reads",
                code="unsupported_field",
            )


def leaves(fields: LoraFields) -> dict[str, str]:
    """Leaf -> name, of what a layer has for itself."""
    own: tuple[str, ...] = (_VERA_A, _VERA_B) if fields.vera else (B,) if fields.scales else (A, B)
    own += (MAGNITUDE,) if fields.use_dora else ()
    own += (_TASK, _WEIGHTS) if fields.of_tasks else ()
    return {leaf: leaf for leaf in own}


def _shapes(fields: LoraFields, site: Site, layer: AdaptableLayer) -> dict[str, tuple[int, ...]]:
    """Name -> shape, of all that a layer computes with."""
    r, out, columns = fields.r, site.out_features, site.in_features
    if layer.what == PACKED:
        chosen = len(fields.letters(layer))
        packed: dict[str, tuple[int, ...]] = {B: (out // 3 * chosen, r)}
        return packed if fields.scales else packed | {A: (r * chosen, columns)}
    if fields.scales:
        return {B: (out, r)}
    shapes: dict[str, tuple[int, ...]] = {A: (r, columns), B: (out, r)}
    if fields.vera:
        shapes |= {_VERA_A: (r, r), _VERA_B: (out, out)}
    if fields.of_tasks:
        tasks = fields.n_up_projection or 1
        shapes |= {B: (tasks, out, r), _TASK: (r,), _WEIGHTS: (tasks,)}
    return shapes | ({MAGNITUDE: (out, 1)} if fields.use_dora else {})


def _made(fields: LoraFields, layer: AdaptableLayer, stored: Stored) -> dict[str, Tensor]:
    """What lorac calls the tensors of a layer, folded where the library keeps more factors than two."""
    if layer.what == PACKED:
        return _unpacked(fields, layer, stored)
    if fields.scales:
        return {"ia3_l": _scaled(stored[B], fields.alpha)}
    down, up = stored[A], stored[B]
    if fields.vera:
        down, up = _product(stored[_VERA_A], down), _product(stored[_VERA_B], up)
    if fields.weights_sharpness is not None:
        weights = torch.softmax(stored[_WEIGHTS].double() / fields.weights_sharpness, 0)
        up = (weights[:, None, None] * up).sum(0).to(up.dtype)
        down = stored[_TASK][:, None] * down
    found = {"lora_A": down, "lora_B": up}
    return found | ({"magnitude": stored[MAGNITUDE].flatten()} if fields.use_dora else {})


def _unpacked(fields: LoraFields, layer: AdaptableLayer, stored: Stored) -> dict[str, Tensor]:
    """The tensors of the parts, by the names that a ``Split`` gives them."""
    letters = fields.letters(layer)
    ups = dict(zip(letters, stored[B].chunk(len(letters)), strict=True))
    if fields.scales:
        ones = torch.ones_like(ups[letters[0]])
        scales = {part: _scaled(ups.get(part, ones), fields.alpha) for part in fields.parts(layer)}
        return {f"{part}_ia3_l": scale.clone() for part, scale in scales.items()}
    downs = dict(zip(letters, stored[A].chunk(len(letters)), strict=True))
    return {
        f"{part}_{name}": cut[part].clone() for part in letters for name, cut in (("lora_A", downs), ("lora_B", ups))
    }


def _scaled(vector: Tensor, alpha: float) -> Tensor:
    return vector if alpha == 1 else vector * alpha


def _product(one: Tensor, other: Tensor) -> Tensor:
    return (one.double() @ other.double()).to(other.dtype)
