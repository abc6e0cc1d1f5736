"""The ``adapted`` op in training: normal forms are computed from trainable tensors, with dropout.

The op applies dropout where the term requires it (docs/architecture.md, "The one idea"): on the input, ``base(x) +
D(x)·(W' − W)ᵀ``; between the factors; or nowhere. For LoRA and DoRA the normal form gives PEFT's result, including the
random numbers.
"""

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lorac.errors import Unavailable
from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import Change, Dense, LowRank, Sparse, merge_bias, merge_weight
from lorac.ir.sites.site import BaseReader, Site, cast_floating
from lorac.ir.slots.choice import Choice
from lorac.ir.slots.execution import (
    FormulaContext,
    SiteCall,
    apply_stage,
    compute_branch_delta,
    embed_virtual,
    run_site,
)
from lorac.ir.slots.invocation import no_prompt_error
from lorac.ir.slots.layouts import SiteLayout
from lorac.ir.slots.plans import BranchFill, BranchSlot, SitePlan, SiteSlots
from lorac.ir.slots.program_values import branch_owner
from lorac.ir.slots.roles import ROLES, SlotSpec, Stage, acts_at, keeps_base_weight, tensors_by_role
from lorac.ir.traces.gate import can_hook_saved_tensors


class Dropout(enum.StrEnum):
    """Where the ``adapted`` op applies dropout, in training only."""

    INPUT = "input"
    """``base(x) + D(x)·(W' − W)ᵀ`` (PEFT's rule)."""
    RANK = "rank"
    """Between the factors of the low-rank form or of a branch's formula; biases are dropped too."""
    NONE = "none"


_DROPOUTS = (Dropout.INPUT, Dropout.RANK)
DropoutDelta = Callable[[Tensor, Tensor, float], Tensor]
"""Function (x, y, rate) -> y' − y, with dropout at this rate."""


@dataclass(frozen=True, eq=False)
class LiveTerm:
    """One active term, computed in this training step from the adapter's tensors.

    Attributes:
        strength: t.
        change: the weight form, or None for a branch.
        rate: dropout rate.
        dropout: where dropout acts.
        dropout_delta: the function that computes the change of y with dropout between the factors, if the form does not
            suffice.
        invoked: the adapter's name, if the adapter has invocation tokens; else empty.
    """

    strength: float
    change: Change | None = None
    branch: tuple[BranchSlot, BranchFill] | None = None
    rate: float = 0.0
    dropout: Dropout = Dropout.NONE
    dropout_delta: DropoutDelta | None = None
    invoked: str = ""


class TrainingTerms(ABC):
    """The terms that a training step computes from the adapters' tensors."""

    @abstractmethod
    def at(self, path: str, choice: Choice) -> Sequence[LiveTerm] | None:
        """Return the active terms of a site; None if no adapter of the choice touches it."""

    @abstractmethod
    def over(self, base: BaseReader) -> "TrainingTerms":
        """Return the same terms for other base weights."""

    @abstractmethod
    def current(self, choice: Choice) -> "TrainingTerms":
        """Return the terms for the adapters' current tensors, as torch.func.functional_call substitutes them.

        Without a substitution, return these terms.
        """


def run_terms(terms: Sequence[LiveTerm], call: SiteCall) -> Tensor:
    """Return ``y + Σ t·(y'ᵢ − y)`` of active terms, sorted by adapter name, where y is the base's output.

    Raises:
        Unavailable: a term has a dropout rate, and dropout is not defined for its form.
    """
    ctx = call.ctx
    own = [term.change for term in terms if isinstance(term.change, LowRank) and operands.VIRTUAL in term.change.scales]
    if own:  # at most one, at strength 1 (``lorac.ir.slots.composition``)
        rest = [term for term in terms if term.change is not own[0]]
        return embed_virtual(_lay_out(call.layout, own[0]), call, lambda real: run_terms(rest, real))
    if call.block is None and len(terms) == 1 and (alone := terms[0].change) is not None:
        whole = not isinstance(alone, LowRank) or acts_at(alone, Stage.INPUT)
        drops = any(_active_rate(terms[0], ctx, place) for place in _DROPOUTS)
        if whole and terms[0].strength == 1 and not drops:
            if not isinstance(alone, LowRank) or not keeps_base_weight(call.layout, alone):
                return _run_with_weight(alone, call)
            slots = _lay_out(call.layout, alone.folded(), merge_bias(alone, call.bias))
            return run_site(SitePlan(call.ctx.own_site), slots, call)
    y = base = call.base()
    earlier = list[BranchSlot]()
    for term in terms:
        if term.branch is not None:
            slot, fill = term.branch
            _refuse_dropout(term, ctx, _DROPOUTS, "whose branch is not affine")
            y = y + compute_branch_delta(slot, fill, call, base, branch_owner(earlier, slot))
            earlier.append(slot)
        elif term.dropout_delta is not None and (rate := _active_rate(term, ctx, Dropout.RANK)):
            y = y + _scale(term.strength, term.dropout_delta(call.x, base, rate)).to(y.dtype)
        elif isinstance(term.change, LowRank) and keeps_base_weight(call.layout, term.change):
            y = _add_low_rank(term, term.change.folded(), call, base, y)
        elif term.change is not None:
            assert not term.invoked
            _refuse_dropout(term, ctx, (Dropout.RANK,), "whose formula has no factors to drop between")
            rate = _input_rate(term, call)
            dropped = dataclasses.replace(call, x=F.dropout(call.x, rate)) if rate else call
            delta = _run_with_weight(term.change, dropped) - (dropped.base() if rate else base)
            y = y + _scale(term.strength, delta)
    return y


def combine_weights(
    site: Site, terms: Sequence[LiveTerm], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the weight W + Σ t·(W'ᵢ − W) in its module's layout, and the bias.

    For sites whose weight is read ``within`` a module's forward. Dropout needs the site's input and is not applied.
    """
    assert weight is not None
    matrix, shift = site.present(weight), bias
    only = terms[0].change if len(terms) == 1 and terms[0].strength == 1 else None
    if only is not None:
        # Return the replaced tensor itself, since its module may write into it in training (running means).
        own = only.weight if isinstance(only, Dense) else merge_weight(only, matrix)
        return site.store(own), merge_bias(only, bias)
    total = matrix
    for term in terms:
        assert term.change is not None
        total = total + term.strength * (merge_weight(term.change, matrix) - matrix)
        changed = merge_bias(term.change, bias)
        if bias is not None and shift is not None and changed is not None:
            shift = shift + term.strength * (changed - bias)
    return site.store(total), shift


def _scale(strength: float, delta: Tensor) -> Tensor:
    return delta if strength == 1 else strength * delta


def _active_rate(term: LiveTerm, ctx: FormulaContext, dropout: Dropout) -> float:
    return term.rate if ctx.training and term.dropout is dropout else 0.0


def _input_rate(term: LiveTerm, call: SiteCall) -> float:
    """Return the rate of dropout on the input; ids are never dropped (PEFT's rule)."""
    return _active_rate(term, call.ctx, Dropout.INPUT) if call.x.is_floating_point() else 0.0


def _refuse_dropout(term: LiveTerm, ctx: FormulaContext, places: Sequence[Dropout], why: str) -> None:
    if any(_active_rate(term, ctx, place) for place in places):
        raise Unavailable(
            f"dropout is not defined for the method at '{ctx.own_site.path}', {why}",
            next_step="set the method's dropout to 0, or train in eval mode",
        )


def _lay_out(layout: SiteLayout, change: LowRank, bias: Tensor | None = None) -> SiteSlots:
    """Return a change's tensors, and a bias, in slot layout."""
    tensors = tensors_by_role(change) | ({} if bias is None else {operands.BIAS: bias})
    return SiteSlots({name: ROLES[name].into_slot(layout, tensor) for name, tensor in tensors.items()})


def _add_low_rank(term: LiveTerm, change: LowRank, call: SiteCall, base: Tensor, y: Tensor) -> Tensor:
    """Return y plus a term's change; it is computed only for the tokens on which the adapter acts, as in PEFT.

    Raises:
        Unavailable: the call does not say on which tokens the adapter acts.
    """
    if not term.invoked:
        return y + _scale(term.strength, _low_rank_delta(term, change, call, base)).to(y.dtype)
    acting = call.acting.get(term.invoked)
    if acting is None or acting.numel() != call.x.shape[:-1].numel():
        raise no_prompt_error([term.invoked], f"; or leave '{call.ctx.own_site.path}' out of its targets")
    own = acting.reshape(call.x.shape[:-1])
    delta = _low_rank_delta(term, change, dataclasses.replace(call, x=call.x[own]), base[own])
    return y.index_put((own,), _scale(term.strength, delta).to(y.dtype), accumulate=True)


def _low_rank_delta(term: LiveTerm, change: LowRank, call: SiteCall, base: Tensor) -> Tensor:
    layout, x, ctx = call.layout, call.x, call.ctx
    slots, rate = _lay_out(layout, change), _input_rate(term, call)
    cast = cast_floating(x, change.a.dtype)
    dropped = F.dropout(cast, rate) if rate else cast
    deltas = []
    if change.rank:
        down = apply_stage(Stage.BETWEEN, layout, slots, apply_stage(Stage.DOWN, layout, slots, dropped))
        rank_rate = _active_rate(term, ctx, Dropout.RANK)
        up = apply_stage(Stage.UP, layout, slots, F.dropout(down, rank_rate) if rank_rate else down)
        deltas.append(apply_stage(Stage.AFTER, layout, slots, up))
    if slots.stages[Stage.OUTPUT] or slots.stages[Stage.INPUT]:
        if rate:
            linear = _multiply_cast(call, dropped)
        else:
            linear = base if call.bias is None else base - layout.per_output(call.bias)
        deltas.append(_product_delta(change, slots, call, dropped, linear))
    if change.e is not None:
        deltas.append(layout.per_output(change.e))
    return sum(deltas[1:], deltas[0]) if deltas else torch.zeros_like(base)


def _multiply_cast(call: SiteCall, x: Tensor) -> Tensor:
    """Return the base's product with an input, which is cast from the factors' dtype to the weight's."""
    return call.multiply(x.to(call.base_weight.dtype))


def _product_delta(change: LowRank, slots: SiteSlots, call: SiteCall, x: Tensor, linear: Tensor) -> Tensor:
    """Return c∘(W·((d∘x)·T)) − W·x, where ``linear`` is W·x."""
    layout = call.layout
    outputs, product = slots.stages[Stage.OUTPUT], linear
    if slots.stages[Stage.INPUT]:
        product = _multiply_cast(call, apply_stage(Stage.INPUT, layout, slots, x))
    elif len(outputs) == 1:  # one role's difference, rounded once, as in PEFT
        role, tensor = outputs[0]
        return role.apply(layout, linear.to(tensor.dtype), tensor - role.neutral(SlotSpec(layout=layout)).to(tensor))
    # In the factors' wider dtype, so that the sum of all deltas is rounded once.
    return apply_stage(Stage.OUTPUT, layout, slots, product.to(change.a.dtype) if outputs else product) - linear


def _run_with_weight(change: Change, call: SiteCall) -> Tensor:
    base = call.ctx.own_site.present(call.base_weight)
    merged, bias = merge_weight(change, base), merge_bias(change, call.bias)
    with _merge_in_backward(change, base, merged):
        return call.layout.bound(call.x, call.layout.slot_weight(merged), bias)


def _merge_in_backward(change: Change, base: Tensor, merged: Tensor) -> AbstractContextManager[object]:
    """Return a context in which ops do not save a sparse change's merged weight; the backward pass merges it again.

    Otherwise every layer would keep a copy of its weight until the backward pass.
    """
    if not isinstance(change, Sparse) or not merged.requires_grad or not can_hook_saved_tensors():
        return nullcontext()
    version, held = base._version, merged.untyped_storage()._cdata

    def pack(tensor: Tensor) -> Tensor | tuple[Any, ...]:
        kept = tensor.untyped_storage()._cdata != held
        return tensor if kept else (tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(packed: Tensor | tuple[Any, ...]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if base._version != version:
            raise Unavailable(
                "a base weight changed between a forward and its backward pass",
                next_step="run backward before the weight is changed",
            )
        with torch.no_grad():
            return merge_weight(change, base).as_strided(*packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
