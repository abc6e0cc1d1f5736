"""Adapters made from changes: a LoRA if every change is a pair, else an ``Edit``, which stores normal forms."""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorac.adapters.lora_conversion import replace_by_lora
from lorac.errors import require_base
from lorac.ir.algebra.changes import Change, Delta, Dense, LowRank, SparseSum
from lorac.ir.sites.site import cast_floating
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.edit import PARTS, Edit

_SIZED: Mapping[str, str] = {"a": "pair", "t": "t", "values": "sparse"}
"""Tensor whose last axis is the size of a part -> the part."""


@torch.no_grad()
def hold_changes(
    name: str,
    changes: Mapping[str, Change],
    *,
    like: Variant | None = None,
    weight: Callable[[str], Tensor] | None = None,
    replaced: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Make an adapter with these changes at strength 1; its tensors may share memory with them.

    It is a ``LoRA`` of scale 1 if every change is a pair without scales, with ``lora_bias`` if a change shifts the
    bias; else it is an ``Edit``. Sites without a change are left out.

    Args:
        name: name of the result.
        changes: site path -> change.
        like: a method with the result's ``dropout``, ``parameters``, ``modules_to_save`` and ``bias``.
        weight: function site path -> W (out, in); called for ``Dense`` changes, of which W' − W is stored.
        replaced: the parameters that the result replaces, by name.
        dtype: dtype of the tensors; default: unchanged.

    Raises:
        BaseNeeded: a change is ``Dense``, and there is no ``weight``.
    """
    like = like or Edit()
    held = {path: parts for path, change in changes.items() if (parts := _hold(path, change, weight))}
    if dtype is not None:
        held = {path: {key: cast_floating(part, dtype) for key, part in parts.items()} for path, parts in held.items()}
    pairs = bool(held) and all({"a", "b"} <= parts.keys() <= {"a", "b", "e"} for parts in held.values())
    if pairs:
        tensors = {
            path: {"lora_A": p["a"].mT.contiguous(), "lora_B": p["b"].mT.contiguous()} for path, p in held.items()
        }
        if any("e" in parts for parts in held.values()):
            for path, parts in held.items():
                b = parts["b"]
                tensors[path]["lora_bias"] = parts["e"] if "e" in parts else b.new_zeros(b.shape[-1])
        made = replace_by_lora(Adapter(name, like), None, tensors)
    else:
        sizes = {path: _measure_parts(parts) for path, parts in held.items()}
        [(usual, _)] = Counter(tuple(parts.items()) for parts in sizes.values()).most_common(1) or [((), 0)]
        variant = Edit(
            parts=dict(usual),
            by_site={path: parts for path, parts in sizes.items() if tuple(parts.items()) != usual},
            targets=tuple(held),
            parameters=like.parameters,
            modules_to_save=like.modules_to_save,
            bias="all" if like.bias == "all" else "none",
        )
        tensors = {path: {key: part.contiguous() for key, part in parts.items()} for path, parts in held.items()}
        made = Adapter(name, variant, tensors)
    made.replaced |= replaced or {}
    return made


def _hold(path: str, change: Change, weight: Callable[[str], Tensor] | None) -> dict[str, Tensor]:
    """Return a change's tensors under the names of ``Edit``."""
    shift = {} if change.e is None else {"e": change.e}
    if isinstance(change, LowRank):
        folded = change.folded()
        pair = {"a": folded.a, "b": folded.b} if folded.rank else {}
        return {**pair, **folded.scales, **shift}
    if isinstance(change, Delta):
        return {"delta": change.delta, **shift}
    if isinstance(change, Dense):
        weight = require_base(
            weight,
            f"the change of the weight of '{path}' depends on that weight",
            next_step="pass model=, the base that the adapter was trained on",
        )
        base = weight(path)
        wide = torch.promote_types(torch.promote_types(base.dtype, change.weight.dtype), torch.float32)
        return {"delta": change.weight.to(wide) - base.to(wide), **shift}
    terms = change.terms if isinstance(change, SparseSum) else ((1.0, change),)
    every = torch.stack([torch.cat([t.rows for _, t in terms]), torch.cat([t.cols for _, t in terms])])
    indices, places = torch.unique(every, dim=1, return_inverse=True)
    values = torch.cat([term.values if strength == 1 else strength * term.values for strength, term in terms])
    summed = {"indices": indices, "values": values.new_zeros(indices.shape[1]).index_add_(0, places, values)}
    return {**(summed if summed["values"].numel() else {}), **shift}


def _measure_parts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the parts of an edit to which these tensors belong, with their sizes."""
    sizes = {_SIZED.get(key, key): tensor.shape[-1] if key in _SIZED else 1 for key, tensor in tensors.items()}
    return {part: sizes[part] for part in PARTS if part in sizes}
