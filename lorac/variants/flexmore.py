"""FlexMoRE: experts of unequal ranks, and full ones, beside the MLP of a dense public model, which is expert 0.

Pirchert et al. 2026, arXiv 2602.08818, on FlexOlmo (arXiv 2507.07024). The layout of their checkpoints (packed experts)
is another model's; here the dense model keeps its own MLP and its own class.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lorac.errors import AdapterError, SiteError
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.reduction import Params
from lorac.ir.patterns import is_named
from lorac.ir.sites import Site, SiteKind
from lorac.variants import _initialisers as _inits
from lorac.variants._bottleneck_layers import ACTIVATIONS
from lorac.variants._routing import top_k
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Context
from lorac.variants.params import ParamSpec

Tensor = torch.Tensor
_PARTS = ("gate", "up", "down")
_ROWS, _SEED = 3, 0
"""Of the input that a model's MLP is held against its equation on."""


@dataclass(frozen=True, kw_only=True)
class FlexMoRE(BranchVariant):
    """``y' = Σ_{e ∈ top-k} p_e·E_e(x)``, E_e(x) = D_e·(act(G_e·x) ∘ U_e·x), E_0 the model's MLP, p = softmax(R·x).

    A matrix of an expert of rank r is the model's plus B·A; of one of rank 0 it is its own. The products of the model's
    G and U are computed once for all experts, and its D takes the sum of what the experts of low rank give. The logits
    R·x (…, 1 + experts) are emitted as ``"router"``.

    Attributes:
        targets: MLPs; empty: every gated one of the model, found by structure.
        ranks: of each expert beside the model's own; 0: a full one.
        top_k: how many each token is sent to, the model's own MLP counted; equal shares go to the lowest index.
        normalise: the chosen shares are made to sum to 1 (FlexOlmo's norm_topk_prob).
        gate, up, down: names of the MLP's layers; empty: found by structure.
        activation: act; found by structure.
        hidden: rows of G; found by structure.
    """

    targets: str | tuple[str, ...] = ()
    ranks: tuple[int, ...]
    top_k: int = 2
    normalise: bool = False
    gate: str = ""
    up: str = ""
    down: str = ""
    activation: str = ""
    hidden: int = 0

    name: ClassVar[str] = "flexmore"
    paper: ClassVar[str] = (
        "FlexMoRE: A Flexible Mixture of Rank-heterogeneous Experts for Efficient Federatedly-trained Large Language "
        "Models, arXiv 2602.08818"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.BLOCK})
    identity_at_init: ClassVar[bool] = False
    emits: ClassVar[tuple[str, ...]] = ("router",)

    def starts_as_base(self, site: Site) -> bool:
        """Where experts all start as the model's own and their shares sum to 1."""
        return self.normalise and all(self.ranks)

    def reads(self, site: Site) -> tuple[str, ...]:
        shared = any(self.ranks)
        return tuple(f"{site.path}.{name}" for name in (self.gate, self.up) if shared) + (
            (f"weight:{site.path}.{self.down}",) if shared else ()
        )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        if not self.ranks or min(self.ranks) < 0:
            raise AdapterError(
                f"FlexMoRE takes a rank for each expert, and got ranks={self.ranks!r}",
                next_step="give ranks=(8, 64), 0 for a full expert",
            )
        specs = {"router": ParamSpec((1 + len(self.ranks), site.in_features), _inits.kaiming_uniform)}
        sizes = {
            "gate": (self.hidden, site.in_features),
            "up": (self.hidden, site.in_features),
            "down": (site.out_features, self.hidden),
        }
        for number, rank in enumerate(self.ranks, 1):
            for part, (gives, takes) in sizes.items():
                specs |= _expert_specs(f"{part}_{number}", gives, takes, rank)
        return specs

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        logits = F.linear(x, p.router)
        ctx.emit("router", logits)
        shares, act = self._shares(logits), ACTIVATIONS[self.activation]
        total = shares[..., :1] * y
        shared = [ctx.value(name) for name in self.reads(ctx.site)]
        common = None
        for number, rank in enumerate(self.ranks, 1):
            share = shares[..., number : number + 1]
            gate, up = (_apply_expert(x, p, f"{part}_{number}", rank) for part in ("gate", "up"))
            if rank:
                gate, up = gate + shared[0], up + shared[1]
            given = share * act(gate) * up
            total = total + _apply_expert(given, p, f"down_{number}", rank)
            if rank:
                common = given if common is None else common + given
        return total if common is None else total + F.linear(common, shared[2])

    def _shares(self, logits: Tensor) -> Tensor:
        """Shares (…, 1 + experts): the softmax over all, of the chosen; computed in float32 at least."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        shares = torch.softmax(logits.to(wide), dim=-1)
        kept = shares * top_k(shares, self.top_k)
        return (kept / kept.sum(-1, keepdim=True) if self.normalise else kept).to(logits.dtype)

    # ── Its places ───────────────────────────────────────────────────────────────────────────────────────────────────
    def for_model(self, view: ModelView, inputs: object = None) -> FlexMoRE:
        found = {
            path: layers
            for path, layers in _find_gated_mlps(view.module)
            if not self.targets or is_named(self.targets, path)
        }
        alike = {layers.named: path for path, layers in found.items()}
        if len(alike) != 1:
            raise SiteError(
                f"FlexMoRE sits at MLPs of one kind, and {type(view.module).__name__} has {len(alike)} among its "
                "targets; looked for modules of three linear layers without bias behind the first two, of which the "
                "third takes act(gate) times up",
                next_step="name MLPs of one kind in targets=",
                code="site_unsupported",
            )
        layers = next(iter(found.values()))
        return dataclasses.replace(self, targets=self.targets or tuple(found), **vars(layers))

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
        """The mixture of a public model and others that differ from it in their MLPs.

        A matrix of rank r is the truncated SVD of what an expert's differs from the public one's by, with √Σ on both
        sides: A = √Σ·Vᵀ, B = U·√Σ.

        Args:
            model: the public model.
            experts: models of its class.
            routers: path of an MLP -> R (1 + experts, d).
            ranks: of each expert, 0 for a full one.
            top_k, normalise: as the variant's.
            name: the new adapter's name.

        Raises:
            SiteError: no gated MLP is found.
            AdapterError: an expert or a router is another model's.
        """
        unsettled = FlexMoRE(ranks=tuple(ranks), top_k=top_k, normalise=normalise, targets=tuple(routers))
        variant = unsettled.for_model(ModelView.of(model))
        tensors = {path: {"router": router.detach().clone()} for path, router in routers.items()}
        numbered = list(zip(range(1, 1 + len(ranks)), experts, ranks, strict=True))
        for path, part in itertools.product(routers, _PARTS):
            layer = f"{path}.{getattr(variant, part)}.weight"
            for number, expert, rank in numbered:
                tensors[path] |= _extract_expert(f"{part}_{number}", expert, model, layer, rank)
        return Adapter(name, variant, tensors)


@dataclass(frozen=True)
class _GatedLayers:
    """The layers of a gated MLP, as the variant's fields."""

    gate: str
    up: str
    down: str
    activation: str
    hidden: int

    @property
    def named(self) -> tuple[str, ...]:
        return self.gate, self.up, self.down, self.activation, str(self.hidden)


def _expert_specs(name: str, gives: int, takes: int, rank: int) -> dict[str, ParamSpec]:
    """The tensors of one matrix of an expert: of low rank it starts as the model's own."""
    if not rank:
        return {name: ParamSpec((gives, takes), _inits.kaiming_uniform)}
    return {
        f"{name}_A": ParamSpec((rank, takes), _inits.kaiming_uniform),
        f"{name}_B": ParamSpec((gives, rank), _inits.zeros),
    }


def _apply_expert(z: Tensor, p: Params, name: str, rank: int) -> Tensor:
    """z times an expert's own matrix, or times what it adds to the model's."""
    if not rank:
        return F.linear(z, getattr(p, name))
    return F.linear(F.linear(z, getattr(p, f"{name}_A")), getattr(p, f"{name}_B"))


def _extract_expert(name: str, expert: nn.Module, model: nn.Module, layer: str, rank: int) -> dict[str, Tensor]:
    own, base = (found.get_parameter(layer).detach() for found in (expert, model))
    if own.shape != base.shape:
        raise AdapterError(
            f"'{layer}' has the shape {tuple(own.shape)} in an expert and {tuple(base.shape)} in the public model",
            next_step="give models of one class and size",
            code="shape_mismatch",
        )
    if not rank:
        return {name: own.clone()}
    u, s, v = torch.linalg.svd((own - base).double(), full_matrices=False)
    root = s[:rank].sqrt()
    a, b = root[:, None] * v[:rank], u[:, :rank] * root
    # Beyond the smaller side a rank adds nothing: zeros fill it up.
    lacking = rank - len(root)
    factors = {f"{name}_A": F.pad(a, (0, 0, 0, lacking)), f"{name}_B": F.pad(b, (0, lacking))}
    return {key: factor.to(own).contiguous() for key, factor in factors.items()}


def _find_gated_mlps(model: nn.Module) -> Iterator[tuple[str, _GatedLayers]]:
    """Path and layers of every gated MLP: three linear layers that answer what the equation says, held against it."""
    known: dict[tuple[object, ...], _GatedLayers | None] = {}
    for path, module in model.named_modules():
        linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        if len(linears) != len(_PARTS):
            continue
        shapes = tuple((name, tuple(layer.weight.shape)) for name, layer in linears.items())
        key = (type(module), shapes)
        if key not in known:
            known[key] = _identify_layers(module, linears)
        layers = known[key]
        if layers is not None:
            yield path, layers


def _identify_layers(module: nn.Module, linears: Mapping[str, nn.Linear]) -> _GatedLayers | None:
    """Which layer is which, and the activation between; None where the module answers anything else."""
    alone = copy.deepcopy(module).double().eval()
    for gate, up, down in itertools.permutations(linears):
        first, second, last = (linears[name] for name in (gate, up, down))
        if first.weight.shape != second.weight.shape or first.weight.shape != last.weight.shape[::-1]:
            continue
        z = torch.randn(_ROWS, first.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED))
        found = _identify_activation(alone, z.to(first.weight.device), gate, up, down)
        if found is not None and last.bias is None:
            return _GatedLayers(gate, up, down, found, first.out_features)
    return None


@torch.no_grad()
def _identify_activation(module: nn.Module, z: Tensor, gate: str, up: str, down: str) -> str | None:
    try:
        answer = module(z)
    except Exception:  # a module that takes more than one tensor is no MLP, whatever it makes of its absence
        return None
    first, second, last = (module.get_submodule(name) for name in (gate, up, down))
    same = (n for n, act in ACTIVATIONS.items() if torch.allclose(last(act(first(z)) * second(z)), answer))
    return next(same, None)
