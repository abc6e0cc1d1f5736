"""FlexMoRE: experts of different ranks, and full experts, next to a dense public model's MLP, which is expert 0.

Pirchert et al. 2026, arXiv 2602.08818, on FlexOlmo (arXiv 2507.07024). Their checkpoints (stacked experts) belong to
another model class; here the dense model keeps its MLP and class.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from lorac.argument_types import Bounds, Count
from lorac.errors import AdapterError, AdapterNotFound, BaseNeeded, SiteError, shape_error
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.patterns import is_named
from lorac.variants._bottleneck_layers import ACTIVATIONS
from lorac.variants._mixtures import top_k_mask
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Context, Params, ParamSpec, Site, SiteKind, Tensor
from lorac.variants.initialisers import kaiming_uniform, zeros

_LAYER_NAMES = ("gate", "up", "down")
_ROWS, _SEED = 3, 0
"""Number of rows, and seed, of the input on which a model's MLP is compared with its equation."""


@dataclass(frozen=True, kw_only=True)
class FlexMoRE(BranchVariant):
    """``y' = Σ_{e ∈ top-k} p_e·E_e(x)``, E_e(x) = D_e·(act(G_e·x) ∘ U_e·x), E_0 the model's MLP, p = softmax(R·x).

    A matrix of an expert of rank r is the model's plus B·A; an expert of rank 0 has whole matrices. The products with
    the model's G and U are computed once for all experts, and the model's D is applied to the sum of the low-rank
    experts. The logits R·x (…, 1 + experts) are emitted as ``"router"``.

    Attributes:
        targets: MLPs; empty: every gated MLP of the model, found by structure.
        ranks: rank of each expert except the model's MLP; 0 for a full expert.
        top_k: number of experts per token, including the model's own MLP; ties go to the lowest index.
        normalise: whether the chosen shares are scaled to sum to 1 (FlexOlmo's norm_topk_prob).
        gate, up, down: names of the MLP's layers; empty: found by structure.
        activation: act; found by structure.
        hidden: number of rows of G; found by structure.
    """

    targets: str | Sequence[str] = ()
    ranks: tuple[int, ...]
    top_k: Count = 2
    normalise: bool = False
    gate: str = ""
    up: str = ""
    down: str = ""
    activation: str = ""
    hidden: Annotated[int, Bounds(0)] = 0

    name = "flexmore"
    paper = (
        "FlexMoRE: A Flexible Mixture of Rank-heterogeneous Experts for Efficient Federatedly-trained Large Language "
        "Models, arXiv 2602.08818"
    )
    kinds = frozenset({SiteKind.BLOCK})
    identity_at_init = False
    emits = ("router",)

    def starts_as_base(self, site: Site) -> bool:
        # Low-rank experts start as the model's MLP; with shares that sum to 1 the mixture equals this MLP.
        return self.normalise and all(self.ranks)

    def reads(self, site: Site) -> tuple[str, ...]:
        if not any(self.ranks):
            return ()
        return (f"{site.path}.{self.gate}", f"{site.path}.{self.up}", f"weight:{site.path}.{self.down}")

    def params(self, site: Site) -> dict[str, ParamSpec]:
        if not self.ranks or min(self.ranks) < 0:
            raise AdapterError(
                f"FlexMoRE needs a rank of 0 or more for each expert, not ranks={self.ranks!r}",
                next_step="give ranks=(8, 64), 0 for a full expert",
            )
        specs = {"router": ParamSpec((1 + len(self.ranks), site.in_features), kaiming_uniform)}
        sizes = {
            "gate": (self.hidden, site.in_features),
            "up": (self.hidden, site.in_features),
            "down": (site.out_features, self.hidden),
        }
        for number, rank in enumerate(self.ranks, 1):
            for part, (gives, takes) in sizes.items():
                name = f"{part}_{number}"
                if rank:  # starts as the model's matrix
                    specs[f"{name}_A"] = ParamSpec((rank, takes), kaiming_uniform)
                    specs[f"{name}_B"] = ParamSpec((gives, rank), zeros)
                else:
                    specs[name] = ParamSpec((gives, takes), kaiming_uniform)
        return specs

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        logits = F.linear(x, p.router)
        ctx.emit("router", logits)
        shares, act = self._shares(logits), ACTIVATIONS[self.activation]
        total = shares[..., :1] * y
        base = [ctx.value(name) for name in self.reads(ctx.site)]
        low_rank_sum = None
        for number, rank in enumerate(self.ranks, 1):
            share = shares[..., number : number + 1]
            gate, up = (_apply_expert(x, p, f"{part}_{number}", rank) for part in ("gate", "up"))
            if rank:
                gate, up = gate + base[0], up + base[1]
            hidden = share * act(gate) * up
            total = total + _apply_expert(hidden, p, f"down_{number}", rank)
            if rank:
                low_rank_sum = hidden if low_rank_sum is None else low_rank_sum + hidden
        return total if low_rank_sum is None else total + F.linear(low_rank_sum, base[2])

    def _shares(self, logits: Tensor) -> Tensor:
        """Return shares (…, 1 + experts): the softmax over all experts, zero for experts that are not chosen."""
        shares = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        chosen = shares * top_k_mask(shares, self.top_k)
        return (chosen / chosen.sum(-1, keepdim=True) if self.normalise else chosen).to(logits.dtype)

    def for_model(self, view: ModelView, inputs: object = None) -> "FlexMoRE":
        found = {
            path: layers
            for path, layers in _find_gated_mlps(view.module)
            if not self.targets or is_named(self.targets, path)
        }
        kinds = set(found.values())
        if len(kinds) != 1:
            raise SiteError(
                f"FlexMoRE needs MLPs of one kind, and {type(view.module).__name__} has {len(kinds)} among its "
                "targets; an MLP has three linear layers, and the third has no bias and reads act(gate) times up",
                next_step="name MLPs of one kind in targets=",
            )
        return dataclasses.replace(self, targets=self.targets or tuple(found), **vars(kinds.pop()))

    @staticmethod
    def from_experts(
        model: nn.Module,
        experts: Sequence[nn.Module],
        routers: Mapping[str, Tensor],
        *,
        ranks: Sequence[int],
        top_k: int = 2,
        normalise: bool = False,
        name: str = "flexmore",
    ) -> Adapter:
        """Make the mixture of a public model and of models that differ from it in their MLPs.

        A matrix of rank r is the truncated SVD of the difference between the expert's and the public matrix, with √Σ on
        both sides: A = √Σ·Vᵀ, B = U·√Σ.

        Args:
            model: the public model.
            experts: models of the public model's class.
            routers: path of an MLP -> R (1 + experts, d).
            ranks: rank of each expert, 0 for a full expert.
            top_k, normalise: fields of the variant.
            name: the new adapter's name.

        Raises:
            SiteError: no gated MLP is found.
            AdapterError: an expert or a router has other shapes than the public model.
        """
        settings = FlexMoRE(ranks=tuple(ranks), top_k=top_k, normalise=normalise, targets=tuple(routers))
        variant = settings.for_model(ModelView.of(model))
        tensors = {path: {"router": router.detach().clone()} for path, router in routers.items()}
        numbered = list(zip(range(1, 1 + len(ranks)), experts, ranks, strict=True))
        for path, part in itertools.product(routers, _LAYER_NAMES):
            layer = f"{path}.{getattr(variant, part)}.weight"
            for number, expert, rank in numbered:
                own = expert.get_parameter(layer).detach()
                base = _get_matrix(model, layer, own.shape)
                tensors[path] |= _extract_expert(f"{part}_{number}", own, base, rank)
        return Adapter(name, variant, tensors)

    @staticmethod
    def join(
        adapters: Sequence[Adapter],
        *,
        model: nn.Module | None = None,
        ranks: Sequence[int] | None = None,
        top_k: int = 2,
        normalise: bool = False,
        name: str = "flexmore",
    ) -> Adapter:
        """Combine the experts of several mixtures that were trained separately next to one public model.

        A router's shares do not change when its first row, the public model's, is subtracted from all its rows. The
        combined router has 0 as its first row, followed by the other rows of all routers.

        Args:
            adapters: mixtures at the same MLPs.
            model: the public model, needed for ``ranks``; it is only read.
            ranks: new rank of each expert, in order, 0 for a full expert, by the SVD as in ``from_experts``; default:
                the experts' ranks.
            top_k, normalise: fields of the variant.
            name: the new adapter's name.

        Raises:
            AdapterNotFound: there is no adapter, or an adapter of another method.
            AdapterError: two adapters are at different MLPs, the model has other shapes, or ``ranks`` has not one rank
                per expert.
            BaseNeeded: a rank changes, and ``model`` is None.
        """
        variants = _check_joinable(adapters)
        old = [rank for variant in variants for rank in variant.ranks]
        new = tuple(old if ranks is None else ranks)
        if len(new) != len(old):
            raise AdapterError(
                f"there are {len(new)} ranks for {len(old)} experts", next_step="give one for each, in their order"
            )
        if model is None and new != tuple(old):
            raise BaseNeeded("other ranks need the public model's weights", next_step="give model=")
        variant = dataclasses.replace(variants[0], ranks=new, top_k=top_k, normalise=normalise)
        sources = [(adapter, n) for adapter, own in zip(adapters, variants, strict=True) for n in range(len(own.ranks))]
        tensors: dict[str, dict[str, Tensor]] = {}
        for path in adapters[0].tensors:
            rows = [adapter.tensors[path]["router"].detach() for adapter in adapters]
            tensors[path] = {"router": torch.cat([torch.zeros_like(rows[0][:1]), *(r[1:] - r[:1] for r in rows)])}
        for path, part, (number, (adapter, own)) in itertools.product(tensors, _LAYER_NAMES, enumerate(sources, 1)):
            key, rank = f"{part}_{number}", new[number - 1]
            names = {f"{part}_{own + 1}{suffix}": f"{key}{suffix}" for suffix in ("", "_A", "_B")}
            given = adapter.tensors[path].items()
            expert = {names[name]: tensor.detach().clone() for name, tensor in given if name in names}
            if model is not None and rank != old[number - 1]:
                layer = f"{path}.{getattr(variant, part)}.weight"
                if key in expert:
                    whole = expert[key]
                    base = _get_matrix(model, layer, whole.shape)
                else:
                    a, b = expert[f"{key}_A"], expert[f"{key}_B"]
                    base = _get_matrix(model, layer, torch.Size((len(b), a.shape[1])))
                    whole = base + b @ a
                expert = _extract_expert(key, whole, base, rank)
            tensors[path] |= expert
        return Adapter(name, variant, tensors)


@dataclass(frozen=True)
class _GatedLayers:
    """The layers of a gated MLP, under the names of the variant's fields."""

    gate: str
    up: str
    down: str
    activation: str
    hidden: int


def _apply_expert(z: Tensor, p: Params, name: str, rank: int) -> Tensor:
    """Multiply z by a full expert's matrix, or by a low-rank expert's product B·A."""
    if not rank:
        return F.linear(z, getattr(p, name))
    return F.linear(F.linear(z, getattr(p, f"{name}_A")), getattr(p, f"{name}_B"))


def _check_joinable(adapters: Sequence[Adapter]) -> list[FlexMoRE]:
    """Check that adapters are mixtures at the same MLPs; return their variants."""
    variants = [adapter.variant for adapter in adapters if isinstance(adapter.variant, FlexMoRE)]
    if not variants or len(variants) < len(adapters):
        raise AdapterNotFound("one of the adapters, if any, is not a FlexMoRE", next_step="give FlexMoREs")
    places = [
        (adapter.tensors.keys(), variant.gate, variant.up, variant.down, variant.activation, variant.hidden)
        for adapter, variant in zip(adapters, variants, strict=True)
    ]
    other = next((n for n, place in enumerate(places) if place != places[0]), None)
    if other is not None:
        raise shape_error(
            f"'{adapters[other].name}' adapts other MLPs than '{adapters[0].name}'",
            next_step="give mixtures next to one public model",
        )
    return variants


def _get_matrix(model: nn.Module, layer: str, shape: torch.Size) -> Tensor:
    """Return the public model's matrix, after checking that it has the expert's shape."""
    base = model.get_parameter(layer).detach()
    if base.shape != shape:
        raise shape_error(
            f"'{layer}' has the shape {tuple(shape)} in an expert and {tuple(base.shape)} in the public model",
            next_step="give models of one class and size",
        )
    return base


def _extract_expert(name: str, own: Tensor, base: Tensor, rank: int) -> dict[str, Tensor]:
    """Return a full expert's matrix, or the factors of its truncated difference from the public matrix."""
    if not rank:
        return {name: own.clone()}
    u, s, v = torch.linalg.svd((own - base).double(), full_matrices=False)
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    # Ranks above the smaller side add nothing and are padded with zeros.
    missing = rank - len(root)
    factors = {f"{name}_A": F.pad(a, (0, 0, 0, missing)), f"{name}_B": F.pad(b, (0, missing))}
    return {key: factor.to(own).contiguous() for key, factor in factors.items()}


def _find_gated_mlps(model: nn.Module) -> Iterator[tuple[str, _GatedLayers]]:
    """Yield path and layers of every gated MLP: modules with three linear layers whose output equals the equation's."""
    known: dict[tuple[object, ...], _GatedLayers | None] = {}
    for path, module in model.named_modules():
        linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        if len(linears) != len(_LAYER_NAMES):
            continue
        shapes = tuple((name, tuple(layer.weight.shape)) for name, layer in linears.items())
        key = (type(module), shapes)
        if key not in known:
            known[key] = _identify_layers(module, linears)
        layers = known[key]
        if layers is not None:
            yield path, layers


def _identify_layers(module: nn.Module, linears: Mapping[str, nn.Linear]) -> _GatedLayers | None:
    """Return the roles of the layers and the activation; None if the module computes anything else."""
    copied = copy.deepcopy(module).double().eval()
    for gate, up, down in itertools.permutations(linears):
        first, second, last = (linears[name] for name in (gate, up, down))
        if first.weight.shape != second.weight.shape or first.weight.shape != last.weight.shape[::-1]:
            continue
        z = torch.randn(_ROWS, first.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED))
        z = z.to(first.weight.device)
        try:
            answer = copied(z)
        except Exception:  # a module that needs more than one tensor is not an MLP, whatever it raises
            continue
        one, two, three = (copied.get_submodule(name) for name in (gate, up, down))
        matching = (n for n, act in ACTIVATIONS.items() if torch.allclose(three(act(one(z)) * two(z)), answer))
        if (found := next(matching, None)) is not None and last.bias is None:
            return _GatedLayers(gate, up, down, found, first.out_features)
    return None
