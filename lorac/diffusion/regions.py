"""Regions of a picture: a concept each, and the tensors that it needs at every cross-attention."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lorac.adapters.factors import iter_changes
from lorac.diffusion.attention import RegionAttention, attention_path
from lorac.errors import InputMismatch, shape_error
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.changes import Change, LowRank, merge_weight
from lorac.session.compiled import Compiled
from lorac.variants.adapter import Adapter

States = Tensor | Mapping[str, Tensor]
"""States of a prompt (tokens, width), or those that each cross-attention reads, by its path (ED-LoRA)."""


@dataclass(frozen=True, eq=False)
class Region:
    """A concept and its place.

    Attributes:
        box: (top, left, bottom, right), fractions of height and width.
        states: of the region's prompt, by the concept's own text encoder.
        negative: of its negative prompt.
        words: the places of the concept's words in the prompt.
        concept: the adapter whose keys, values and output projections of cross-attention are used; None: the model's.
    """

    box: tuple[float, float, float, float]
    states: States
    negative: States
    words: Sequence[int]
    concept: Adapter | None = None


def write_regions(programs: Sequence[Compiled], regions: Sequence[Region], view: ModelView) -> None:
    """Write regions into the buffers of programs (``RegionAttention``, ``ConceptIsolation``); the next call sees them.

    Args:
        programs: compiled from one model with the same adapters; one may stand there twice.
        regions: at most as many as the programs have room for; the other places become empty.
        view: the model.

    Raises:
        InputMismatch: there are more regions than places, or states of another number of tokens.
        AdapterError: the output projection of a concept has a change that is not of the programs' rank.
    """
    variant = programs[0].adapters["regions"].variant
    assert isinstance(variant, RegionAttention)
    if len(regions) > variant.regions:
        raise InputMismatch(
            f"there are {len(regions)} regions, and the program has room for {variant.regions}",
            next_step=f"make it with regions={len(regions)}",
        )
    written = [_tensors(region, variant, programs[0].adapters["regions"].sites, view) for region in regions]
    for program in programs:
        for tensor in (tensor for adapter in program.adapters.values() for tensor in adapter.parameters()):
            tensor.zero_()
        for n, (region, tensors) in enumerate(zip(regions, written, strict=True)):
            for own in (own for adapter in program.adapters.values() for own in adapter.tensors.values()):
                own["boxes"][n] = torch.tensor(region.box)
            for path, own in program.adapters["regions"].tensors.items():
                for key, value in tensors[path].items():
                    place = own[key].movedim(-3, 0)[n]  # both keys (groups, n, …) and factors (n, …)
                    place[tuple(slice(size) for size in value.shape)] = value


def _tensors(
    region: Region, variant: RegionAttention, sites: Sequence[str], view: ModelView
) -> dict[str, dict[str, Tensor]]:
    """Return by site its keys and values (2, tokens, features) and the factors of the change of its output."""
    paths = [f"{attention_path(site)}.{layer}" for site in sites for layer in ("to_k", "to_v", "to_out.0")]
    concept = region.concept
    touched = [] if concept is None else [path for path in paths if path in concept.tensors]
    changes = {} if concept is None else dict(iter_changes(touched, concept, view))
    found: dict[str, dict[str, Tensor]] = {}
    for site in sites:
        at = attention_path(site)
        words = torch.stack([s[at] if isinstance(s, Mapping) else s for s in (region.states, region.negative)])
        if words.shape[1] != variant.tokens:
            raise InputMismatch(
                f"a region's prompt has {words.shape[1]} tokens, and the program has room for {variant.tokens}",
                next_step=f"make it with tokens={words.shape[1]}, or pad all prompts to one length",
            )
        found[site] = {"keys": _project(words, f"{at}.to_k", changes, view)}
        found[site]["values"] = _project(words, f"{at}.to_v", changes, view)
        if site in changes:
            found[site] |= _factors(changes[site], variant.r, site)
    return found


def _project(words: Tensor, path: str, changes: Mapping[str, Change], view: ModelView) -> Tensor:
    """Return the projection of states by a layer as a concept changes it."""
    site = view.sites[path]
    weight, bias, change = view.base.weight(site), view.base.bias(site), changes.get(path)
    if change is None:
        return F.linear(words, weight, bias)
    shift = change.e if bias is None else bias if change.e is None else bias + change.e
    return F.linear(words, merge_weight(change, weight), shift)


def _factors(change: Change, r: int, path: str) -> dict[str, Tensor]:
    """Return the factors of a change of an output projection."""
    folded = change.folded() if isinstance(change, LowRank) else None
    if folded is None or folded.scales or folded.e is not None or folded.rank > r:
        what = "more than two factors" if folded is None or folded.rank <= r else f"rank {folded.rank}"
        raise shape_error(
            f"the concept's change of '{path}' has {what}, and the program takes factors of rank {r}",
            next_step=f"make the program with a larger r=, or convert the concept: lorac.to_lora(..., rank={r})",
        )
    return {"out_A": folded.a.mT, "out_B": folded.b.mT}
