"""The terms of a training step, computed from the adapters' tensors."""

import copy
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from lorac.adapters.adapter_sites import get_once_path
from lorac.adapters.pool import AdapterPool
from lorac.adapters.preparation import Preparer, make_branch_term, make_once_term
from lorac.errors import Unavailable
from lorac.ir.algebra.changes import LowRank
from lorac.ir.algebra.reduction import BRANCH, Params
from lorac.ir.sites.site import BaseReader, Site, SiteKind
from lorac.ir.slots.choice import Active, Choice
from lorac.ir.slots.filling import strength_tensor
from lorac.ir.slots.live_terms import Dropout, LiveTerm, TrainingTerms
from lorac.ir.slots.plans import BranchFill, BranchTerm
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Variant, invocation_of


class AdapterTerms(TrainingTerms):
    """Terms through which gradients flow to the tensors of a pool's adapters.

    Args:
        preparer: the preparer that evaluates the formulas.
        base: reader of base weights; default: the preparer's.
        given: name -> adapter that replaces the pool's.
    """

    def __init__(
        self,
        pool: AdapterPool,
        preparer: Preparer,
        base: BaseReader | None = None,
        given: Mapping[str, Adapter] = MappingProxyType({}),
    ) -> None:
        self._pool, self._preparer, self._base, self._given = pool, preparer, base, given

    def over(self, base: BaseReader) -> "AdapterTerms":
        return AdapterTerms(self._pool, self._preparer, base, self._given)

    def current(self, choice: Choice) -> "AdapterTerms":
        given = self._pool.find_given([name for name, _ in choice])
        return AdapterTerms(self._pool, self._preparer, self._base, given) if given else self

    def at(self, path: str, choice: Choice) -> Sequence[LiveTerm] | None:
        adapters, preparer = {**self._pool.adapters, **self._given}, self._preparer
        for name, _ in choice:
            if name not in adapters:
                raise Unavailable(
                    f"adapter '{name}' is registered, and calls that train, record gradients or look for "
                    "invocation tokens need its tensors in memory",
                    next_step="call the model in eval mode under torch.no_grad(), or add the adapter by add_adapter",
                )
        if self._base is not None:
            preparer = copy.copy(preparer)
            preparer.base = self._base
        terms = (self._term(preparer, adapters[name], preparer.sites[path], active) for name, active in choice)
        return [term for term in terms if term is not None] or None

    def _term(self, preparer: Preparer, adapter: Adapter, site: Site, active: Active) -> LiveTerm | None:
        tensors = adapter.tensors.get(site.path)
        method = adapter.variant if tensors is None else adapter.variant.method_at(site.path)
        rate, place = float(getattr(method, "dropout", 0.0)), method.dropout_place
        if site.kind is SiteKind.ONCE:
            if site.path != get_once_path(adapter):
                return None
            return _branch_term(make_once_term(adapter, preparer.sites, detach=False), site, active)
        if tensors is None:
            replaced = preparer.replaced_change(adapter, site)
            return None if replaced is None else LiveTerm(active.strength, replaced)
        projects = type(method).constrained is not Variant.constrained and torch.is_grad_enabled()
        if adapter.name not in self._given and projects:  # tensors that violate their method's constraint
            held = {name: tensor.detach() for name, tensor in tensors.items()}
            for name, bounded in method.constrained(Params(**held)).items():
                if tensors[name].requires_grad:
                    held[name].copy_(bounded)
        reduction = preparer.reduction(adapter.variant, site, tensors)
        if reduction.form == BRANCH or (isinstance(method, BranchVariant) and method.samples):
            return _branch_term(make_branch_term(adapter, site, detach=False), site, active, rate, place)
        change = preparer.change(reduction, site, tensors)
        if active.rank is not None and isinstance(change, LowRank):
            change = change.truncated(active.rank, adapter.variant.truncatable or 0.0)
        change = preparer.with_bias(adapter, site, change)
        dropped = preparer.dropped(adapter, site) if rate and place is Dropout.RANK else None
        invoked = adapter.name if invocation_of(adapter.variant) else ""
        return LiveTerm(active.strength, change, rate=rate, dropout=place, dropout_delta=dropped, invoked=invoked)


def _branch_term(
    term: BranchTerm, site: Site, active: Active, rate: float = 0.0, place: Dropout = Dropout.NONE
) -> LiveTerm:
    fill = BranchFill(strength_tensor(term, site, active.strength), term.params)
    return LiveTerm(active.strength, branch=(term.slot, fill), rate=rate, dropout=place)
