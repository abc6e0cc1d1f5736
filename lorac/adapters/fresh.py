"""New adapters from a variant, and trainable copies of adapters."""

import functools
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorac.adapters.fit import check_numbers, sort_by_site
from lorac.errors import AdapterError
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites.patterns import check_targets_match, no_match_error
from lorac.ir.sites.site import BaseReader, Site, SiteKind, cast_floating, factor_dtype
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.params import InitContext, ParamSpec, Role


def make_fresh_adapter(variant: Variant, name: str, view: ModelView, base: BaseReader | None = None) -> Adapter:
    """Make an adapter with its initial values; the global random state does not change.

    Args:
        base: reader of base weights; default: the view's.

    Raises:
        AdapterError: a hyper-parameter is NaN or infinite.
        SiteError: the variant's targets name no site, or a site at which the method is not defined.
    """
    check_numbers(name, variant)
    sites, model, base = view.sites, view.module, base or view.base
    found = variant.named_sites(view)
    # Keep a site of a kind on which the method is not defined, so that the error can name it.
    chosen = [site for site in found if site.kind not in variant.kinds or variant.adapts(site)]
    replaced = [path for path, _ in model.named_modules() if variant.replaces_module(path)]
    check_targets_match(name, variant.targets, sites, replaced)
    check_targets_match(
        name, variant.parameters, {p: site for p, site in sites.items() if site.kind is SiteKind.MATRIX}
    )
    adapter = Adapter(name, variant)
    for site in chosen:
        variant.at(site).check(site)
    specs = {site.path: _make_specs(name, variant, site) for site in chosen}
    # A shared tensor has in each axis the largest size that any site needs.
    shapes: dict[str, tuple[int, ...]] = {}
    for key, spec in itertools.chain.from_iterable(at_site.items() for at_site in specs.values()):
        if spec.shared:
            shapes[key] = tuple(map(max, spec.shape, shapes.get(key, spec.shape)))
    groups: dict[str, list[Site]] = {}
    for site in chosen:
        for spec in filter(lambda one: one.tie, specs[site.path].values()):
            groups.setdefault(spec.tie, []).append(site)
    shared = _SharedTensors(shapes, {}, groups)
    for site in chosen:
        adapter.tensors[site.path] = _make_initial_tensors(specs[site.path], site, name, base, shared)
    saved = variant.modules_to_save
    for path, module in model.named_modules():
        if path in saved or path.rpartition(".")[2] in saved or path in replaced:
            own = ((fqn, view.in_own_size(fqn, parameter)) for fqn, parameter in module.named_parameters(path))
            adapter.replaced |= {fqn: parameter.detach().clone() for fqn, parameter in own}
    for fqn, parameter in model.named_parameters():
        owner, _, leaf = fqn.rpartition(".")
        trains = variant.bias == "all" or (variant.bias != "none" and owner in adapter.tensors)
        if leaf.endswith("bias") and trains:
            adapter.replaced.setdefault(fqn, view.in_own_size(fqn, parameter).detach().clone())
    if not adapter.tensors and not adapter.replaced:
        raise no_match_error(name, variant.all_targets, sites)
    return adapter


def _make_specs(name: str, variant: Variant, site: Site) -> dict[str, ParamSpec]:
    """Return the parameters of an adapter at a site."""
    least = 0 if variant.patterns else 1
    settings = ", ".join(f"{field}={value!r}" for field, value in variant.own_settings.items())
    step = f"give whole numbers above 0 for ranks and sizes; it is {type(variant).__name__}({settings})"
    try:
        specs = variant.at(site).specs(site)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise AdapterError(
            f"adapter '{name}': {variant.name} cannot be made at '{site.path}': {error}", next_step=step
        ) from error
    for key, spec in specs.items():
        if not all(isinstance(size, int) and size >= least for size in spec.shape):
            raise AdapterError(
                f"adapter '{name}': {key} at '{site.path}' would have the shape {spec.shape}", next_step=step
            )
    return specs


def make_site_tensors(
    variant: Variant, name: str, site: Site, base: BaseReader, known: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Make an adapter's initial tensors at one site; tensors that sites share must be in ``known``.

    Args:
        known: tensors that are used unchanged.

    Raises:
        SiteError: the method is not defined at the site.
    """
    variant.at(site).check(site)
    shared = _SharedTensors({}, {**(known or {})}, {})
    return _make_initial_tensors(_make_specs(name, variant, site), site, name, base, shared)


def make_trainable(adapter: Adapter, view: ModelView) -> Adapter:
    """Return a trainable copy of an adapter, with trainable tensors as parameters, in the factors' dtype (PEFT's rule).

    The copy's order depends only on the model and the names: torch stores an optimizer's state by position, and a state
    saved for a fresh adapter must fit an adapter that was read from a file.
    """
    sites = view.sites
    copies: dict[int, Tensor] = {}

    def copy_tensor(tensor: Tensor, dtype: torch.dtype, role: Role) -> Tensor:
        if id(tensor) not in copies:
            copied = cast_floating(tensor.detach(), dtype).clone()
            copies[id(tensor)] = nn.Parameter(copied) if role is Role.TRAINABLE else copied
        return copies[id(tensor)]

    copy = Adapter(adapter.name, adapter.variant, provenance=dict(adapter.provenance))
    for path, tensors in sort_by_site(adapter.tensors, view).items():
        site = sites[path]
        specs = adapter.variant.at(site).specs(site)
        dtype = factor_dtype(site.dtype)
        copy.tensors[path] = {name: copy_tensor(tensors[name], dtype, spec.role) for name, spec in specs.items()}
    for path, source in adapter.provenance.get("tied", {}).items():
        tied, others = copy.tensors.get(path, {}), copy.tensors.get(source, {}).values()
        for name, tensor in tied.items():
            # A tied layer's tensor may be the transpose of its embedding's tensor: an optimizer updates both, as in
            # PEFT.
            alike = (one for one in others if one.ndim == 2 and tensor.requires_grad and tensor is not one)
            other = next((one for one in alike if torch.equal(one.t(), tensor)), None)
            tied[name] = tensor if other is None else nn.Parameter(other.detach().t())
    for fqn in sorted(adapter.replaced, key=[*view.named_tensors()].index):
        tensor = adapter.replaced[fqn]
        buffer = fqn in sites and sites[fqn].buffer
        copy.replaced[fqn] = copy_tensor(tensor, tensor.dtype, Role.BUFFER if buffer else Role.TRAINABLE)
    return copy


def add_replaced_parameters(adapter: Adapter, view: ModelView) -> ModelView:
    """Add sites for replaced parameters and buffers that belong to no other site (a norm's scale, a class token)."""
    owned = {name for site in view.sites.values() for name in (site.weight, site.bias) if name}
    bare = [name for name in adapter.replaced if name not in owned and name not in view.sites]
    return view.with_sites({name: view.make_parameter_site(name) for name in bare}) if bare else view


@dataclass(frozen=True)
class _SharedTensors:
    """The tensors that an adapter's sites share: shapes, tensors made so far, and ``ParamSpec.tie`` -> its sites."""

    shapes: Mapping[str, tuple[int, ...]]
    made: dict[str, Tensor]
    groups: Mapping[str, Sequence[Site]]


@torch.no_grad()
def _make_initial_tensors(
    specs: Mapping[str, ParamSpec], site: Site, name: str, base: BaseReader, shared: _SharedTensors
) -> dict[str, Tensor]:
    site_generator = torch.Generator().manual_seed(_fold_seed(name, site.path))
    tensors: dict[str, Tensor] = {}
    dtype = factor_dtype(site.dtype)
    for key, spec in specs.items():
        known = key if key in shared.made else spec.tie or key
        if known in shared.made:
            tensors[key] = shared.made[known]
            continue
        shape, generator = spec.shape, site_generator
        if spec.shared:
            shape, generator = shared.shapes[key], torch.Generator().manual_seed(_fold_seed(name, key))

        def read(of: Site = site) -> Tensor:
            return base.weight(of).to(dtype)

        def read_all(tie: str = spec.tie) -> list[Tensor]:
            return [read(of) for of in shared.groups.get(tie, (site,))]

        context = InitContext(
            shape, site, read, Params(**tensors), generator, name, read_all, functools.partial(base.bias, site)
        )
        value = spec.init(context)
        tensors[key] = value if spec.role is Role.INDEX else value.to(dtype)
        if spec.shared or spec.tie:
            shared.made[known] = tensors[key]
    return tensors


def _fold_seed(*names: str) -> int:
    # "0" was a default seed; without it fresh adapters would start at other values.
    digest = hashlib.blake2b("\0".join(("0", *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
