"""The merged values of the tensors of a model that a mixture of adapters changes."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lorac.adapters.adapter_sites import add_adapted_modules
from lorac.adapters.fit import check_adapter, find_infinite_sums, refuse_invocation
from lorac.adapters.fresh import add_replaced_parameters
from lorac.adapters.preparation import Preparer
from lorac.errors import AdapterError, CompileError, SiteError, unmergeable_error, warn
from lorac.frontend.components import get_component_prefix
from lorac.frontend.host import Host
from lorac.frontend.model_view import ModelView
from lorac.frontend.weight_reads import describe_only_read, observe_example
from lorac.ir.algebra.changes import Change, LowRank, add_product, compose, merge_bias, merge_weight
from lorac.ir.algebra.operands import BIAS, C
from lorac.ir.algebra.reduction import BRANCH
from lorac.ir.sites.site import Site
from lorac.ir.slots.choice import Active, Choice
from lorac.ir.slots.composition import truncate_adapter
from lorac.ir.slots.plans import BranchTerm, PreparedAdapter
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant

_BLOCK = 1 << 21
"""Number of values of a weight that are in float32 at once, where rows are merged block by block."""


class MergedWeights(Mapping[str, Tensor]):
    """Name -> merged tensor in stored form: computed on access, in float32 or wider, and rounded once.

    Args:
        view: the model, whose tensors are only read.
        adapters: adapters by name.
        choice: the active adapters. Each changes the original weight, and their changes are summed.

    Attributes:
        sites: name of a tensor -> the site whose weight or bias it is.

    Raises:
        AdapterError, SiteError, FormatError: an adapter does not fit the model.
        ChoiceError: a rank is given for a method that cannot be truncated.
        CompileError: an adapter is not a change of weights, or a change does not fit its weight's layout.
    """

    def __init__(self, view: ModelView, adapters: Mapping[str, Adapter], choice: Choice) -> None:
        self._base = view.base
        only_read: set[str] = set()  # layers that the model reads but never calls, if example inputs can be made
        for name, component in view.components.items():
            prefix = get_component_prefix(view.module, name)
            layers = [path for path, site in view.sites.items() if site.is_layer and path.startswith(prefix)]
            reads = observe_example(Host.of(component), [path.removeprefix(prefix) for path in layers])
            only_read |= set() if reads is None else {f"{prefix}{path}" for path in reads.read - reads.called}
        self._parts = [_ActiveAdapter(adapters[name], how, view, only_read) for name, how in choice]
        self.sites: dict[str, Site] = {}
        for part in self._parts:
            self.sites |= part.changed
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Tensor:
        site = self.sites[name]
        if self._last[0] != site.path:
            self.forget()  # release the last site's tensors before these are computed
            self._last = (site.path, self._merge(site))
        return self._last[1][name]

    def forget(self) -> None:
        """Release the tensors of the last site, which are cached because a site may have two."""
        self._last = ("", {})

    @torch.no_grad()
    def _merge(self, site: Site) -> dict[str, Tensor]:
        """Return the merged tensors of a site by name."""
        parts = [part for part in self._parts if site.path in part.paths]
        weight, bias = self._base.weight(site), self._base.bias(site)
        change = compose([(part.strength, part.read(site.path)) for part in parts], lambda: _widen(weight))
        assert change is not None
        if isinstance(change, LowRank) and (site.conv is None or site.conv.groups == 1):
            merged = _merge_rows(change, weight)
        else:  # rows cannot be merged separately, or a grouped convolution's weight is not stored by rows
            merged = merge_weight(change, _widen(weight))
        if site.leaves_blocks(merged):
            raise _not_mergeable(parts[0].adapter, site, "leaves the blocks of a grouped convolution")
        found = {str(site.weight): _round(site.store(merged), weight.dtype, str(site.weight))}
        if bias is not None:
            shifted = merge_bias(change, _widen(bias))
            assert shifted is not None
            found[str(site.bias)] = _round(shifted, bias.dtype, str(site.bias))
        return found


class _ActiveAdapter:
    """An adapter to merge, and the tensors that it changes.

    Attributes:
        adapter, strength: the adapter, and t in W + t·(W' − W).
        paths: paths of the sites that it changes.
        changed: name of each tensor that it changes -> the site.
    """

    def __init__(self, adapter: Adapter, how: Active, view: ModelView, only_read: Collection[str]) -> None:
        check_adapter(adapter, view)
        refuse_invocation(adapter, "merged weights act on every token")
        if adapter.variant.prompt:
            raise _not_mergeable(adapter, view.sites[adapter.sites[0]], "has virtual tokens, which no weight holds")
        sites = add_adapted_modules(adapter, add_replaced_parameters(adapter, view)).sites
        self.adapter, self.strength, self._rank = adapter, how.strength, how.rank
        self._preparer = Preparer(sites, view.base, keep_factors=True)
        self._truncate({})
        self.paths = frozenset(_leave_out_read_layers(adapter, self._preparer.touched(adapter), only_read))
        known = view.named_tensors()
        self.changed: dict[str, Site] = {}
        for path in sorted(self.paths):
            site = sites[path]
            stored = known.get(str(site.weight))
            if stored is not None and (type(stored) not in {Tensor, nn.Parameter} or site.dtype.itemsize < 2):
                raise unmergeable_error(
                    f"nothing can be merged into the {site.packed or stored.dtype} weight of '{path}', which is "
                    "quantised",
                    next_step="give dequantize=True to merge into its float values, or the model as it was before "
                    "quantisation",
                )
            if site.weight is not None and stored is None:
                raise unmergeable_error(
                    f"the weight of '{path}', which adapter '{adapter.name}' changes, is computed at each call",
                    next_step="make it a parameter: torch.nn.utils.parametrize.remove_parametrizations(module, "
                    "'weight')",
                )
            self.changed |= {name: site for name in self._find_changed(site)}

    @torch.no_grad()
    def read(self, path: str) -> Change:
        """Return the adapter's change at a site at strength 1."""
        change = self._preparer.term(self.adapter, path)
        assert not isinstance(change, BranchTerm)
        return self._truncate({path: change}).changes[path]

    def _truncate(self, changes: Mapping[str, Change]) -> PreparedAdapter:
        prepared = PreparedAdapter(changes, {}, self.adapter.variant.truncatable)
        return truncate_adapter(self.adapter.name, prepared, self._rank)

    def _find_changed(self, site: Site) -> Iterator[str]:
        """Yield the names of the tensors that change at a site."""
        adapter, shifts = self.adapter, site.bias in self.adapter.replaced
        if site.path in adapter.tensors:
            reduction = self._preparer.reduction(adapter.variant, site, adapter.tensors[site.path])
            if reduction.form == BRANCH:
                raise _not_mergeable(adapter, site, "runs a branch that no weight can replace")
            shifts |= BIAS in reduction.outputs
        if site.bias is None and shifts:
            shift = self.read(site.path).e
            if shift is not None and shift.any():
                raise _not_mergeable(adapter, site, "needs a bias, which the layer lacks")
        if site.weight is not None and (site.path in adapter.tensors or site.weight in adapter.replaced):
            yield site.weight
        if site.bias is not None and shifts:
            yield site.bias


def _not_mergeable(adapter: Adapter, site: Site, why: str) -> CompileError:
    instead = adapter.variant.instead if isinstance(adapter.variant, BranchVariant) else ""
    return unmergeable_error(
        f"adapter '{adapter.name}' ({adapter.variant.name}) cannot be merged: at '{site.path}' it {why}",
        next_step=instead or "compiled.save(folder) saves the model with the adapter as it is",
    )


def _leave_out_read_layers(adapter: Adapter, paths: Iterable[str], only_read: Collection[str]) -> list[str]:
    """Return the paths without layers that are never called, at which the adapter had no effect in training either."""
    paths = list(paths)
    read = [path for path in paths if path in only_read]
    if not read:
        return paths
    what = describe_only_read(read)
    if len(read) == len(paths):
        raise SiteError(
            f"adapter '{adapter.name}' has no effect: it acts on {what}",
            next_step="there is nothing to merge",
            code="site_unreached",
        )
    warn(f"adapter '{adapter.name}' has no effect at {what}: nothing is merged there")
    return [path for path in paths if path not in read]


def _merge_rows(change: LowRank, weight: Tensor) -> Tensor:
    """Return W' (out, in), or a stack, in the dtype of W; only a block of rows at a time is in float32."""
    change, merged = change.folded(), torch.empty_like(weight)
    if weight.ndim == 3:
        for number, matrix in enumerate(weight):
            scales = {name: scale[number] for name, scale in change.scales.items()}
            merged[number] = _merge_rows(LowRank(change.a[number], change.b[number], scales), matrix)
        return merged
    step = max(1, _BLOCK // weight.shape[1])
    wide = torch.promote_types(torch.promote_types(weight.dtype, torch.float32), change.a.dtype)
    block = weight.new_empty(min(step, len(weight)), weight.shape[1], dtype=wide)
    left, right = change.b.mT.to(wide), change.a.mT.to(wide)
    for begin in range(0, len(weight), step):
        rows = slice(begin, begin + step)
        part = block[: len(weight) - begin]
        part.copy_(weight[rows])
        if change.scales:
            scales = {name: scale[rows] if name == C else scale for name, scale in change.scales.items()}
            part = merge_weight(replace(change, b=change.b[:, rows], scales=scales), part)
        else:
            add_product(part, left[rows], right, out=part)
        merged[rows] = part
    return merged


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _round(merged: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Round a merged tensor to the dtype that the model stores."""
    rounded = merged.to(dtype).contiguous()
    if find_infinite_sums({name: rounded}) and not torch.isfinite(rounded).all():
        raise AdapterError(
            f"a merged value of '{name}' is NaN, or larger than {str(dtype).removeprefix('torch.')} can hold",
            next_step="load the model in bfloat16 or float32, and merge into that"
            if dtype is torch.float16
            else "merge at a lower strength, or take an earlier checkpoint of the adapter",
            code="non_finite",
        )
    return rounded
