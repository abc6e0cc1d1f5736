"""Adapters in normal form: the formula of a structure is reduced once, then evaluated for each adapter's tensors."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lorac.adapters.adapter_sites import get_once_path
from lorac.errors import NeedsRecompile
from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import Change, Dense, LowRank, from_outputs, list_tensors, map_tensors, stack_changes
from lorac.ir.algebra.formulas import Formula
from lorac.ir.algebra.reduction import (
    BRANCH,
    LOW_RANK,
    Params,
    Reduction,
    reduce_branch,
    reduce_rows,
    reduce_weight,
    run_with_dropout,
)
from lorac.ir.algebra.rules import RULES
from lorac.ir.algebra.structure import AlgebraRule
from lorac.ir.sites.site import BaseReader, Site, SiteKind, cast_floating, factor_dtype
from lorac.ir.slots.execution import FormulaContext
from lorac.ir.slots.layouts import pad_rows
from lorac.ir.slots.live_terms import Dropout, DropoutDelta
from lorac.ir.slots.plans import BranchSlot, BranchTerm, PreparedAdapter, Reason
from lorac.ir.slots.stacks import StackShape
from lorac.storage.reductions import check_sizes, reduction_from_json, reduction_to_json
from lorac.storage.strict_json import JsonObject
from lorac.variants._missing_method import class_modules
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Variant, WeightVariant, invocation_of

_REDUCTIONS: dict[tuple[object, ...], Reduction] = {}
"""Structure (method, hyper-parameters, shapes, dtype, rules) -> its reduction, for all programs of this process."""
_MAX_REDUCTIONS = 512
Shapes = tuple[tuple[str, torch.Size], ...]
_FORMULAS = ("weight", "new_bias", "compute_bias", "branch")


class Preparer:
    """Preparer of adapters, which reduces each structure once.

    Args:
        sites: every site of the model.
        base: reader of base weights.
        keep_factors: whether to keep products of factors at any rank, even where one dense matrix is cheaper to apply.

    Attributes:
        stored: reductions of an artifact by structure (``stored_reductions``), which are not traced again.
    """

    def __init__(
        self,
        sites: Mapping[str, Site],
        base: BaseReader,
        rules: Sequence[AlgebraRule] = RULES,
        *,
        keep_factors: bool = False,
    ) -> None:
        self.sites, self.base, self.rules, self.keep_factors = sites, base, tuple(rules), keep_factors
        self.stored: Mapping[str, JsonObject] = {}
        self._from_artifact: dict[str, Reduction] = {}
        self._shared_results: MutableMapping[Tensor, dict[tuple[int, str], tuple[object, Tensor]]] = (
            WeakTensorKeyDictionary()
        )
        self._by_site: dict[str, tuple[Variant, Shapes, Reduction]] = {}
        self._method: tuple[Variant, tuple[object, ...]] | None = None

    @torch.no_grad()
    def prepare(self, adapter: Adapter, *, packed: bool = False) -> PreparedAdapter:
        """Return the normal forms of all terms of an adapter that passed ``check_adapter``.

        Args:
            packed: whether to put low-rank tensors of equal shape into one block of memory (``pack_adapter``).
        """
        changes: dict[str, Change] = {}
        branches: dict[str, BranchTerm] = {}
        reasons: list[Reason] = []
        for path in self.touched(adapter):
            tensors = adapter.tensors.get(path)
            reduction = None if tensors is None else self.reduction(adapter.variant, self.sites[path], tensors)
            if reduction is not None:
                reasons += [Reason(adapter.name, path, why) for why in reduction.reasons]
            if reduction is not None and reduction.form == BRANCH:
                branches[path] = make_branch_term(adapter, self.sites[path])
            else:
                changes[path] = self._find_change(adapter, path, reduction, contiguous=not packed)
        once = get_once_path(adapter)
        branches |= {once: make_once_term(adapter, self.sites)} if once else {}
        owned = {site.weight: path for path, site in self.sites.items() if site.is_resizable}
        sizes = {owned[name]: len(tensor) for name, tensor in adapter.replaced.items() if name in owned}
        power, labels = adapter.variant.truncatable, tuple(adapter.provenance.get("labels", ()))
        prompt, prefix = adapter.variant.prompt, None
        if prompt is not None:
            [(path, own)] = adapter.tensors.items()
            prefix = prompt.prefix(self.sites[path], {name: tensor.detach() for name, tensor in own.items()})
        invocation = invocation_of(adapter.variant)
        prepared = PreparedAdapter(changes, branches, power, tuple(reasons), sizes, labels, invocation, prefix)
        return pack_adapter(prepared, adapter) if packed else prepared

    def number(self, adapter: Adapter, numbered: Adapter, factors: list[float]) -> PreparedAdapter | None:
        """Return normal forms that hold the numbers of an adapter's values in place of the values.

        Args:
            adapter: an adapter with values.
            numbered: an adapter with the numbers of these values (``Reduction.follow``).
            factors: numbers by which values are multiplied; missing ones are appended.

        Returns:
            The normal forms; None if the adapter is more than pairs whose values are those of its tensors.
        """
        variant = adapter.variant
        if adapter.replaced or not variant.acts_at_sites or variant.prompt is not None or invocation_of(variant):
            return None
        changes: dict[str, Change] = {}
        for path, tensors in adapter.tensors.items():
            site = self.sites[path]
            reduction = self.reduction(variant, site, tensors)
            is_pair = reduction.form == LOW_RANK and {*reduction.outputs} == {operands.A, operands.B}
            if site.stack or not is_pair or not all(tensor.numel() for tensor in tensors.values()):
                return None
            found = reduction.follow([numbered.tensors[path][name] for name in reduction.params], factors)
            if found is None:
                return None
            changes[path] = LowRank(found[operands.A], found[operands.B])
        return PreparedAdapter(changes, {}, variant.truncatable)

    def touched(self, adapter: Adapter) -> list[str]:
        """Return the paths of the sites that an adapter touches: adapted sites, then sites with replaced tensors."""
        owners = {name: path for path, site in self.sites.items() for name in (site.weight, site.bias) if name}
        own = adapter.tensors if adapter.variant.acts_at_sites else ()
        return list(dict.fromkeys([*own, *(owners[fqn] for fqn in adapter.replaced)]))

    def term(self, adapter: Adapter, path: str) -> Change | BranchTerm:
        """Return the normal form of an adapter's term at a site that it touches."""
        site, tensors = self.sites[path], adapter.tensors.get(path)
        reduction = None if tensors is None else self.reduction(adapter.variant, site, tensors)
        if reduction is not None and reduction.form == BRANCH:
            return make_branch_term(adapter, site)
        return self._find_change(adapter, path, reduction)

    def _find_change(
        self, adapter: Adapter, path: str, reduction: Reduction | None, *, contiguous: bool = True
    ) -> Change:
        """Return the change of a site's term that is not a branch.

        Args:
            reduction: the term's reduction; None if the adapter only replaces tensors of the site.
            contiguous: whether to detach the change's tensors and make them contiguous.
        """
        site = self.sites[path]
        if reduction is None:
            change = self.replaced_change(adapter, site)
            assert change is not None
        else:
            change = self.change(reduction, site, adapter.tensors[path])
            change = self.with_bias(adapter, site, change) if adapter.replaced else change
        return map_tensors(lambda tensor: tensor.detach().contiguous(), change) if contiguous else change

    def reduction(self, variant: Variant, site: Site, tensors: Mapping[str, Tensor]) -> Reduction:
        """Return the reduction of a variant at a site, from the cache if the structure is known."""
        tensors = {name: tensor[0] for name, tensor in tensors.items()} if site.stack else tensors
        shapes = tuple([(name, tensor.shape) for name, tensor in tensors.items()])
        known = self._by_site.get(site.path)
        # Training calls this in every step, where a description of the structure would take longest.
        if known is None or known[1] != shapes or not (known[0] is variant or known[0] == variant):
            found = self._find_reduction(variant.at(site), site, shapes, tensors)
            known = self._by_site[site.path] = variant, shapes, found
        return known[2]

    def _find_reduction(self, variant: Variant, site: Site, shapes: Shapes, tensors: Mapping[str, Tensor]) -> Reduction:
        shape = (site.out_features, site.in_features)
        method = self._method  # the same at all sites, except for patterns
        if method is None or method[0] is not variant:
            formulas = [getattr(type(variant), formula, None) for formula in _FORMULAS]
            method = self._method = variant, (type(variant), *formulas, repr(variant))
        if self.stored and (text := _describe(variant, site, shapes)) in self.stored:
            found = self._from_artifact.get(text)
            if found is None:  # cached for this model only
                found = reduction_from_json(self.stored[text])
                check_sizes(found, shape, tensors.values())
                self._from_artifact[text] = found
            return found
        key = (*method[1], site.kind, self._keeps_factors(variant, site), shape, shapes, site.dtype, self.rules)
        found = _REDUCTIONS.get(key)
        if found is None:
            found = _REDUCTIONS[key] = self._reduce(variant, site, shape, tensors)
            for oldest in list(_REDUCTIONS)[:-_MAX_REDUCTIONS]:
                _REDUCTIONS.pop(oldest, None)
        return found

    def stored_reductions(self, adapters: Iterable[Adapter]) -> dict[str, object]:
        """Return the adapters' reductions as JSON by structure; methods from other packages are left out."""
        found: dict[str, object] = {}
        built_in = [adapter for adapter in adapters if not class_modules(adapter.variant)]
        for adapter, path in ((one, path) for one in built_in for path in one.tensors):
            site, tensors = self.sites[path], adapter.tensors[path]
            variant = adapter.variant.at(site)
            shapes = tuple([(name, (tensor[0] if site.stack else tensor).shape) for name, tensor in tensors.items()])
            text = _describe(variant, site, shapes)
            if text in found:
                continue
            stored = reduction_to_json(self.reduction(adapter.variant, site, tensors))
            found |= {} if stored is None else {text: stored}
        return dict(sorted(found.items()))

    def change(self, reduction: Reduction, site: Site, tensors: Mapping[str, Tensor]) -> Change:
        """Return the normal form of one term, computed in the factors' dtype."""
        dtype = factor_dtype(site.dtype)
        bias = self.base.bias(site)
        if reduction.reads_weight:
            weight = self._weight(site).to(dtype)
        else:
            shape = (*filter(None, (site.stack,)), site.out_features, site.in_features)
            weight = torch.empty(shape, dtype=dtype, device="meta")
        parameters = [cast_floating(tensors[name], dtype) for name in reduction.params]
        wide_bias = bias.to(dtype) if bias is not None else torch.zeros(site.out_features, dtype=dtype)
        if site.stack:
            slices = ([tensor[i] for tensor in parameters] for i in range(site.stack))
            each = (reduction(w, wide_bias, parts) for w, parts in zip(weight, slices, strict=True))
            return stack_changes([from_outputs(reduction.form, outputs, None) for outputs in each])
        outputs = reduction(weight, wide_bias, parameters)
        outputs |= {name: self._share(reduction, name, outputs[name], tensors) for name in reduction.common}
        return from_outputs(reduction.form, outputs, None if bias is None else wide_bias)

    def _weight(self, site: Site) -> Tensor:
        """Return W in the memory order of the model's tensor, since the order of a norm's sum depends on it."""
        weight = self.base.weight(site)
        return weight.contiguous() if site.kind is SiteKind.LINEAR and not site.transposed else weight

    def _share(self, reduction: Reduction, name: str, made: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a tensor made from shared parameters: the cached one of an earlier site, if there is one."""
        if made.requires_grad:
            return made
        shared = [tensors[key] for key in reduction.shared]
        known = self._shared_results.setdefault(shared[0], {})
        written = [(id(t), 0 if t.is_inference() else t._version) for t in shared]
        cached = known.get((id(reduction), name))
        if cached is None or cached[0] != written:
            cached = known[id(reduction), name] = (written, made.contiguous())
        return cached[1]

    def forget_shared(self, tensors: Iterable[Tensor]) -> None:
        """Drop cached results of shared parameters that were written without a change of torch's version counter."""
        for tensor in tensors:
            self._shared_results.pop(tensor, None)

    def with_bias(self, adapter: Adapter, site: Site, change: Change) -> Change:
        """Add the adapter's replacement of the base's bias (PEFT's ``bias=``) to a change."""
        shift = self._bias_shift(adapter, site)
        if shift is None:
            return change
        return dataclasses.replace(change, e=shift if change.e is None else change.e + shift)

    def _bias_shift(self, adapter: Adapter, site: Site) -> Tensor | None:
        trained = adapter.replaced.get(site.bias) if site.bias else None
        if trained is None:
            return None
        bias = self.base.bias(site)
        assert bias is not None
        dtype = factor_dtype(site.dtype)
        return _fill_layer(adapter, site, trained).to(dtype) - bias.to(dtype)

    def dropped(self, adapter: Adapter, site: Site) -> DropoutDelta | None:
        """Return a site's term with dropout between its factors, (x, y, rate) -> y' − y, or None.

        None means that the term's form suffices. A weight formula's form does; an affine branch's form lacks the
        biases.
        """
        tensors = adapter.tensors[site.path]
        reduction = self.reduction(adapter.variant, site, tensors)
        graph, dtype, shift = reduction.dropped, factor_dtype(site.dtype), self._bias_shift(adapter, site)
        if graph is None:
            return None
        parameters = tuple(cast_floating(tensors[name], dtype) for name in reduction.params)

        def delta(x: Tensor, y: Tensor, rate: float) -> Tensor:
            wide = y.to(dtype)
            change = run_with_dropout(graph, x.to(dtype), wide, parameters, rate) - wide
            return change if shift is None else change + shift

        return delta

    def replaced_change(self, adapter: Adapter, site: Site) -> Change | None:
        """Return the change of a site at which an adapter only replaces tensors (modules_to_save, a bias), or None."""
        weight = adapter.replaced.get(site.weight) if site.weight else None
        if weight is not None:
            return self.with_bias(adapter, site, Dense(site.present(_fill_layer(adapter, site, weight).to(site.dtype))))
        if site.bias is None or site.bias not in adapter.replaced:
            return None
        dtype = factor_dtype(site.dtype)
        unchanged = LowRank(
            torch.zeros(site.in_features, 0, dtype=dtype), torch.zeros(0, site.out_features, dtype=dtype)
        )
        return self.with_bias(adapter, site, unchanged)

    def _reduce(self, variant: Variant, site: Site, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Reduction:
        dtype = factor_dtype(site.dtype)
        examples = {name: cast_floating(tensor.detach(), dtype) for name, tensor in tensors.items()}
        keep = self._keeps_factors(variant, site)
        if isinstance(variant, WeightVariant):
            shared = [name for name, spec in variant.specs(site).items() if spec.shared]
            of_weight = Formula(variant.weight, variant.name, site.path)
            of_bias = Formula(variant.compute_bias, variant.name, site.path)

            def formula(w: Tensor, b: Tensor, p: Params) -> tuple[Tensor, Tensor]:
                return of_weight(w, p, like=w), of_bias(w, b, p, like=b)

            return reduce_weight(formula, shape, examples, dtype, self.rules, shared, keep_factors=keep)
        if variant.prompt:
            return reduce_rows(variant.prompt.rows, shape, examples)
        assert isinstance(variant, BranchVariant)
        if site.kind is not SiteKind.LINEAR or variant.reads(site) or variant.has_once:
            return _unreduced(tensors)
        emitted, site_readers = dict[str, list[Tensor]](), set[str]()
        branch = Formula(variant.branch, variant.name, site.path)
        ctx = FormulaContext(site, emitted=emitted, site_readers=site_readers)
        found = reduce_branch(
            lambda x, y, p: branch(x, y, p, ctx, like=y), shape, examples, dtype, self.rules, keep_factors=keep
        )
        if site_readers:  # a reduction is used for every site of this shape
            return _unreduced(tensors, "reads which site it is at")
        # A reduced branch computes only y' and emits nothing.
        return _unreduced(tensors, f"has extra outputs ({', '.join(emitted)})") if emitted else found

    def _keeps_factors(self, variant: Variant, site: Site) -> bool:
        """Return whether to keep factors at any cost, because a reader, dropout or truncation needs them.

        A product of factors may also have entries outside a grouped kernel's blocks, which the kernel cannot store.
        """
        drops = isinstance(variant, WeightVariant) and variant.dropout_place is Dropout.RANK
        return self.keep_factors or drops or variant.truncatable is not None or _is_grouped(site)


def _fill_layer(adapter: Adapter, site: Site, tensor: Tensor) -> Tensor:
    """Pad a replacement of a layer's tensor to the number of rows in the program.

    Raises:
        NeedsRecompile: the replacement has more rows, or the program has layers of one size only.
    """
    if not site.is_resizable or len(tensor) == site.size:
        return tensor
    if not site.own_size or len(tensor) > site.size:
        raise NeedsRecompile(
            f"adapter '{adapter.name}' has {len(tensor)} rows for '{site.path}', and the program "
            f"{'at most ' if site.own_size else ''}{site.size}",
            next_step=f"compile again with reserve=lorac.Reserve(outputs={{'{site.path}': {len(tensor)}}}), or with "
            "the adapter in adapters=",
        )
    return pad_rows(tensor, site.size, math.nan if site.kind is SiteKind.EMBEDDING else 0.0)


def _describe(variant: Variant, site: Site, shapes: Shapes) -> str:
    """Describe a structure as text: everything on which the reduction of one of lorac's methods depends."""
    sizes = {name: list(shape) for name, shape in shapes}
    kind = f"{site.kind} {site.out_features}x{site.in_features} {_is_grouped(site)} {site.dtype}"
    return f"{variant.name}{describe_structure(variant)} {kind} {sizes}"


def _is_grouped(site: Site) -> bool:
    return site.conv is not None and site.conv.groups > 1


def _unreduced(tensors: Mapping[str, Tensor], *reasons: str) -> Reduction:
    """Return the reduction of a branch that runs unchanged."""
    return Reduction(
        BRANCH, torch.fx.GraphModule(nn.Module(), torch.fx.Graph()), tuple(tensors), ("y",), reasons=reasons
    )


def pack_adapter(prepared: PreparedAdapter, adapter: Adapter) -> PreparedAdapter:
    """Put an adapter's low-rank tensors of equal shape next to each other in memory, in the order of its sites.

    All other tensors become contiguous. Tensors that several sites share, and the adapter's own tensors, are not moved.

    Args:
        adapter: the adapter that was prepared.
    """
    found = [t for change in prepared.changes.values() if isinstance(change, LowRank) for t in list_tensors(change)]
    places = [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in found]
    uses = collections.Counter(places)
    contiguous = [tensor.is_contiguous() for tensor in found]
    own = {tensor.untyped_storage().data_ptr() for tensor in adapter.parameters()} if any(contiguous) else set()
    groups: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = collections.defaultdict(list)
    for tensor, place, is_contiguous in zip(found, places, contiguous, strict=True):
        stays = is_contiguous and tensor.untyped_storage().data_ptr() in own
        if uses[place] == 1 and tensor.is_cpu and not stays and 0 not in tensor.shape:
            groups[tensor.dtype, tensor.shape].append(tensor)
    packed: dict[int, Tensor] = {}
    for (dtype, shape), group in groups.items():
        stack = torch.stack(group, out=StackShape(len(group), shape, dtype).new())
        packed |= zip(map(id, group), stack.unbind(), strict=True)

    def exchange(tensor: Tensor) -> Tensor:
        if id(tensor) in packed:
            return packed[id(tensor)]
        return (tensor.detach() if tensor.requires_grad else tensor).contiguous()

    return dataclasses.replace(
        prepared, changes={path: map_tensors(exchange, one) for path, one in prepared.changes.items()}
    )


def make_branch_term(adapter: Adapter, site: Site, *, detach: bool = True) -> BranchTerm:
    """Return the branch term of a site; adapters with equal structure share its slot.

    The parameters have the method's order, since files have orders of their own. If the method defines ``once``, shared
    tensors are left out of the term.
    """
    variant, given, once = adapter.variant.at(site), adapter.tensors[site.path], get_once_path(adapter)
    assert isinstance(variant, BranchVariant)
    tensors = {name: given[name] for name, spec in variant.specs(site).items() if not (once and spec.shared)}
    slot = _make_slot(variant, variant.branch, tensors, once, site.path)
    return BranchTerm(
        replace(slot, emits=variant.emits, reads=variant.reads(site), instead=variant.instead),
        _cast_parameters(tensors, site, detach=detach),
    )


def make_once_term(adapter: Adapter, sites: Mapping[str, Site], *, detach: bool = True) -> BranchTerm:
    """Return the term of an adapter's ``once`` site."""
    variant, first = adapter.variant, sites[adapter.sites[0]]
    assert isinstance(variant, BranchVariant)
    shared = [name for name, spec in variant.at(first).specs(first).items() if spec.shared]
    tensors = {name: adapter.tensors[first.path][name] for name in shared}
    path = get_once_path(adapter)
    slot = _make_slot(variant, variant.once, tensors, path, path)
    return BranchTerm(
        replace(slot, reads=variant.reads_once(), once=""), _cast_parameters(tensors, first, detach=detach)
    )


def describe_structure(variant: Variant) -> str:
    """Return the hyper-parameters that a formula may read, as text; patterns that select sites are left out."""
    return repr({name: value for name, value in variant.own_settings.items() if not name.endswith("_pattern")})


def _make_slot(
    variant: BranchVariant, function: Callable[..., object], tensors: Mapping[str, Tensor], once: str, path: str
) -> BranchSlot:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    key = f"{variant.name}{describe_structure(variant)}{sorted(shapes.items())}{once}"
    return BranchSlot(key, Formula(function, variant.name, path), shapes, once=once, mixes=variant.mixes_tokens)


def _cast_parameters(tensors: Mapping[str, Tensor], site: Site, *, detach: bool) -> tuple[Tensor, ...]:
    dtype = factor_dtype(site.dtype)
    return tuple(cast_floating(tensor.detach() if detach else tensor, dtype) for tensor in tensors.values())
