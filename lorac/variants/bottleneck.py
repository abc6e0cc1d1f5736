"""Bottleneck adapters of AdapterHub: Houlsby's, Pfeiffer's, He's parallel ones, Compacter, AdapterPlus, MAD-X's.

Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00247 (AdapterFusion) and 2005.00052 (MAD-X);
He et al. 2021, arXiv 2110.04366; Mahabadi et al. 2021, arXiv 2106.04647. The fields are those of ``BnConfig``.

Where they sit is found by structure (``lorac.frontend.residual_stream``) when the method meets a model. Let h be what a
sublayer adds, r what it is added to. A pre-LN model computes h + r, and the site is the sublayer: y is h, and the model
adds r to y'. A post-LN model computes LN(h + r), and the site is that LayerNorm: x is h + r, y is LN(h + r), and y' is
the stream itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lorac.errors import ExampleInputsNeeded, SiteError, not_one_of
from lorac.frontend.model_view import ModelView
from lorac.frontend.residual_stream import (
    ResidualStream,
    Sublayer,
    find_common_norm_eps,
    find_stream_ends,
    find_sublayer_sites,
    trace_residual_stream,
)
from lorac.ir.algebra.reduction import Params
from lorac.ir.patterns import find_first_pattern, find_layer_index, is_named
from lorac.ir.sites import Site, SiteKind
from lorac.variants import _initialisers as _inits
from lorac.variants._bottleneck_layers import (
    ACTIVATIONS,
    DOWN_UP,
    PRESETS,
    HypercomplexLayer,
    apply_coupling,
    apply_layer,
    coupling_specs,
    drop_by_site,
    invert_coupling,
    ones_init,
    plain_layer,
)
from lorac.variants.base import BranchVariant, Context
from lorac.variants.params import ParamSpec

Tensor = torch.Tensor
_SCALINGS = ("learned", "channel")
_EPS = 1e-5
"""Of the LayerNorms that an adapter brings, torch's default."""


@dataclass(frozen=True, kw_only=True)
class Bottleneck(BranchVariant):
    """``h' = h + s·(U·act(D·z + p) + q)``, D (β, d), U (d, β), β = d // reduction_factor, z (…, d) by the placement.

    With r the sublayer's residual and LN the LayerNorm of a post-LN model (absent elsewhere): z is h; with
    ``original_ln_before`` LN(h + r); with ``is_parallel`` r. The defaults are Houlsby's (``double_seq_bn``).

    Attributes:
        targets: sublayers, or the LayerNorms behind them; empty: those that the next three choose, found by structure.
        mh_adapter, output_adapter, cross_adapter: behind self-attentions, MLPs, cross-attentions.
        leave_out: numbers of blocks without.
        reduction_factor: d / β.
        reduction_pattern: module pattern -> its own reduction_factor.
        non_linearity: act.
        scaling: s: a number, ``"learned"`` (1,) or ``"channel"`` (d,).
        is_parallel: beside the sublayer, not behind it.
        original_ln_before: z is what the model has after adding the residual (and its norm, where one follows).
        original_ln_after: the model's own residual (and norm) follow; else what the adapter gives is the stream.
        residual_before_ln: what the bottleneck is added to: True: h; False: z; ``"post_add"``: h + r.
        ln_before, ln_after: norms of the adapter's own before D and behind U.
        adapter_residual_before_ln: that sum is made before the latter.
        use_gating: times the mean over positions of σ(g·z + b), per row (padding counts, as in AdapterHub).
        dropout: rate behind s, in training.
        stochastic_depth: rate at which rows go without, in training.
        init_weights: ``"bert"``, ``"mam_adapter"`` (starts as the base) or ``"houlsby"``.
        phm_layer: D and U are hypercomplex (Compacter); ``phm_*``, ``*_phm*`` say how.
        inv_adapter: ``"nice"``: an invertible block behind the embeddings, undone in front of the output layer.
        inv_adapter_reduction_factor: of its bottlenecks.
        residuals: site -> the program value that is r; found by structure.
        inner: LayerNorm that is a site -> the program value that is h; found by structure.
        norm_eps: of those LayerNorms; found by structure.
        embeddings, heads: where the invertible block and its inverse are; found by structure.
    """

    targets: str | tuple[str, ...] = ()
    mh_adapter: bool = True
    output_adapter: bool = True
    cross_adapter: bool = False
    leave_out: tuple[int, ...] = ()
    reduction_factor: float = 16.0
    reduction_pattern: Mapping[str, float] = field(default_factory=dict)
    non_linearity: str = "swish"
    scaling: float | str = 1.0
    is_parallel: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: bool | str = True
    ln_before: bool = False
    ln_after: bool = False
    adapter_residual_before_ln: bool = False
    use_gating: bool = False
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    init_weights: str = "bert"
    phm_layer: bool = False
    phm_dim: int = 4
    phm_rank: int = 1
    phm_bias: bool = True
    factorized_phm_W: bool = True
    shared_W_phm: bool = False
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    learn_phm: bool = True
    phm_c_init: str = "normal"
    phm_init_range: float = 0.0001
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float = 2.0
    residuals: Mapping[str, str] = field(default_factory=dict)
    inner: Mapping[str, str] = field(default_factory=dict)
    norm_eps: float = 1e-12
    embeddings: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    name: ClassVar[str] = "bottleneck"
    paper: ClassVar[str] = "Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.BLOCK, SiteKind.LINEAR, SiteKind.EMBEDDING})
    identity_at_init: ClassVar[bool] = False
    patterned: ClassVar[Mapping[str, str]] = {"reduction_pattern": "reduction_factor"}

    @staticmethod
    def preset(name: str, **fields: Any) -> Bottleneck:
        """One of AdapterHub's named configurations, such as ``"seq_bn"``; fields override what it says.

        Raises:
            OptionError: there is none of that name.
        """
        if name not in PRESETS:
            raise not_one_of("AdapterHub has no configuration", name, PRESETS)
        return Bottleneck(**{**PRESETS[name], **fields})

    # ── The formula ──────────────────────────────────────────────────────────────────────────────────────────────────
    def reads(self, site: Site) -> tuple[str, ...]:
        if self._couples(site):
            return ()
        norm = (f"param:{site.path}.weight", f"param:{site.path}.bias") if self._is_norm(site) else ()
        return (*norm, *(name for name in map(self._value, self._operands(site), [site] * 2) if name is not None))

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        act, site = ACTIVATIONS[self.non_linearity], ctx.site
        if self._couples(site):
            return (
                apply_coupling(y, p, act)
                if find_first_pattern(self.embeddings, site.path)
                else invert_coupling(y, p, act)
            )
        return self._behind_norm(x, y, p, ctx) if self._is_norm(site) else self._at_sublayer(x, y, p, ctx)

    def _at_sublayer(self, x: Tensor, h: Tensor, p: Params, ctx: Context) -> Tensor:
        """What the model adds r to: without ``original_ln_after`` r is taken off again, where it does not cancel."""
        r = self._operand("r", ctx)
        after = h if r is None else h + r
        z = (x if r is None else r) if self.is_parallel else after if self.original_ln_before else h
        kept, inside = self._kept, self.adapter_residual_before_ln and not self.is_parallel
        body = self._body(z, after if kept != "h" else h, p, ctx) if inside else self._body(z, None, p, ctx)
        if r is None:
            return body if inside else body + (after if kept != "h" else h)
        times = (kept != "h" and not inside) - (not self.original_ln_after)
        total = body if inside else body + h
        return total if times == 0 else total + times * r

    def _behind_norm(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        """The stream itself: x is h + r, and y its norm."""
        h, r = self._operand("h", ctx), self._operand("r", ctx)
        z = r if self.is_parallel else y if self.original_ln_before else h
        kept = {"h": h, "z": z, "sum": x}[self._kept]
        inside = self.adapter_residual_before_ln and not self.is_parallel
        body = self._body(z, kept if inside else None, p, ctx)
        if not self.original_ln_after:
            return body if inside else body + kept
        if inside or self._kept == "z":
            total = body + r if inside else body + z + r
        else:
            total = body + x if self._kept == "h" else body + x + r
        weight, bias = (ctx.value(f"param:{ctx.site.path}.{leaf}") for leaf in ("weight", "bias"))
        return F.layer_norm(total, (total.shape[-1],), weight, bias, self.norm_eps)

    def _body(self, z: Tensor, residual: Tensor | None, p: Params, ctx: Context) -> Tensor:
        """s·(U·act(D·z + p) + q), with what is configured around it."""
        width = (z.shape[-1],)
        normed = F.layer_norm(z, width, p.norm_before, p.norm_before_bias, _EPS) if self.ln_before else z
        phm = self._phm
        up = apply_layer(ACTIVATIONS[self.non_linearity](apply_layer(normed, p, "down", phm)), p, "up", phm)
        if not self.is_parallel:
            up = drop_by_site(up, self.stochastic_depth, ctx, (*up.shape[:1], *(1,) * (up.dim() - 1)))
        up = up * (p.scaling if isinstance(self.scaling, str) else self.scaling)
        up = drop_by_site(up, self.dropout, ctx, up.shape)
        if self.use_gating:
            up = up * torch.sigmoid(F.linear(z, p.gate, p.gate_bias)).mean(-2, keepdim=True)
        if residual is not None:
            up = up + residual
        return F.layer_norm(up, width, p.norm_after, p.norm_after_bias, _EPS) if self.ln_after else up

    # ── Where it reads ───────────────────────────────────────────────────────────────────────────────────────────────
    @property
    def _kept(self) -> str:
        """What the bottleneck is added to: ``"h"``, ``"sum"`` (h + r), or ``"z"``, that behind its norm."""
        if self.is_parallel or self.residual_before_ln is True:
            return "h"
        if self.residual_before_ln == "post_add":
            return "sum"
        return "z" if self.original_ln_before else "h"

    def _operands(self, site: Site) -> tuple[str, ...]:
        """Which of h and r the formula asks for beside x and y."""
        kept, inside = self._kept, self.adapter_residual_before_ln and not self.is_parallel
        if not self._is_norm(site):
            asks = self.is_parallel or self.original_ln_before or kept != "h" or not self.original_ln_after
            return ("r",) if asks else ()
        h = not (self.is_parallel or self.original_ln_before) or (
            kept == "h" and (inside or not self.original_ln_after)
        )
        r = self.is_parallel or (self.original_ln_after and (inside or kept != "h"))
        return ("h",) * h + ("r",) * r

    def _value(self, operand: str, site: Site) -> str | None:
        """The program value that is h or r at a site."""
        where = self.residuals if operand == "r" else self.inner
        key = find_first_pattern(where, site.path)
        return None if key is None else where[key]

    def _operand(self, operand: str, ctx: Context) -> Any:
        name = self._value(operand, ctx.site) if operand in self._operands(ctx.site) else None
        return None if name is None else ctx.value(name)

    def _is_norm(self, site: Site) -> bool:
        return find_first_pattern(self.inner, site.path) is not None

    def _couples(self, site: Site) -> bool:
        return find_first_pattern((*self.embeddings, *self.heads), site.path) is not None

    # ── Its tensors ──────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, site: Site) -> None:
        super().check(site)
        if site.kind is SiteKind.EMBEDDING and not self._couples(site):
            raise SiteError(
                f"a bottleneck is behind a sublayer, and '{site.path}' is an embedding",
                next_step='narrow targets=; an invertible block there is asked for by inv_adapter="nice"',
                code="site_unsupported",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        self._check_settings()
        width = site.out_features
        if self._couples(site):
            return coupling_specs(width, self.inv_adapter_reduction_factor)
        beside = self.is_parallel and self._value("r", site) is None
        takes, narrow = site.in_features if beside else width, max(1, int(width // self.reduction_factor))
        specs = self._layers(site, takes, narrow)
        for name, there, size in (("norm_before", self.ln_before, takes), ("norm_after", self.ln_after, width)):
            if there:
                specs |= {name: ParamSpec((size,), ones_init), f"{name}_bias": ParamSpec((size,), _inits.zeros)}
        if isinstance(self.scaling, str):
            specs["scaling"] = ParamSpec((1 if self.scaling == "learned" else width,), ones_init)
        return specs | (plain_layer("gate", takes, 1, _inits.normal(0.02)) if self.use_gating else {})

    def starts_as_base(self, site: Site) -> bool:
        if self._couples(site) or self._is_norm(site) or self.phm_layer or self.ln_after:
            return False
        whole = (self._kept != "h") == (not self.original_ln_after)
        return self.init_weights == "mam_adapter" and (whole or self._value("r", site) is None)

    def _layers(self, site: Site, takes: int, narrow: int) -> dict[str, ParamSpec]:
        phm = self._phm
        if phm is None:
            down, up = DOWN_UP[self.init_weights]
            return plain_layer("down", takes, narrow, down) | plain_layer("up", narrow, site.out_features, up)
        sizes = (takes, narrow, site.out_features)
        if any(size % phm.n for size in sizes):
            raise SiteError(
                f"'{site.path}' has bottlenecks {takes} -> {narrow} -> {site.out_features}, of which phm_dim={phm.n} "
                "divides not all",
                next_step="give a phm_dim and a reduction_factor by which they divide",
                code="site_unsupported",
            )
        return phm.specs("down", takes, narrow) | phm.specs("up", narrow, site.out_features)

    @property
    def _phm(self) -> HypercomplexLayer | None:
        if not self.phm_layer:
            return None
        return HypercomplexLayer(
            n=self.phm_dim,
            rank=self.phm_rank,
            factorized=self.factorized_phm_W,
            shared=self.shared_W_phm,
            shared_rule=self.shared_phm_rule,
            factorized_rule=self.factorized_phm_rule,
            learned=self.learn_phm,
            bias=self.phm_bias,
            start=self.phm_c_init,
            std=self.phm_init_range,
        )

    def _check_settings(self) -> None:
        told: Mapping[str, tuple[object, Sequence[object]]] = {
            "non_linearity": (self.non_linearity, tuple(ACTIVATIONS)),
            "init_weights": (self.init_weights, tuple(DOWN_UP)),
            "phm_c_init": (self.phm_c_init, ("normal", "uniform")),
            "inv_adapter": (self.inv_adapter, (None, "nice")),
        }
        if isinstance(self.scaling, str):
            told = {**told, "scaling": (self.scaling, _SCALINGS)}
        if isinstance(self.residual_before_ln, str):
            told = {**told, "residual_before_ln": (self.residual_before_ln, ("post_add",))}
        for what, (value, known) in told.items():
            if value not in known:
                raise not_one_of(f"Bottleneck has no {what}", value, map(str, known))

    # ── Its places ───────────────────────────────────────────────────────────────────────────────────────────────────
    def for_model(self, view: ModelView, inputs: object = None) -> Bottleneck:
        self._check_settings()
        asks = not self.targets or self.inv_adapter is not None or bool(self._operands(_placeholder_site()))
        try:
            stream = trace_residual_stream(view, inputs)
        except ExampleInputsNeeded:
            if asks and not self.residuals:
                raise
            return self
        return self.placed(view, stream)

    def placed(self, view: ModelView, stream: ResidualStream) -> Bottleneck:
        """This method with its places in a model.

        Raises:
            SiteError: none is found, or one that is has no name.
        """
        places = find_sublayer_sites(view, stream)
        chosen = {path: found for path, found in places.items() if self.wants(found, stream, path)}
        inner = {path: found.modules[-1] for path, found in chosen.items() if found.norm}
        residuals = {path: f"in:{found.residual}" for path, found in chosen.items() if found.residual}
        embeddings, heads = self.embeddings, self.heads
        if self.inv_adapter is not None and not embeddings:
            embeddings, heads = find_stream_ends(view, stream)
        settled = dataclasses.replace(
            self,
            targets=self.targets or (*chosen, *embeddings, *heads),
            inner={**inner, **self.inner},
            residuals={**residuals, **self.residuals},
            norm_eps=find_common_norm_eps([view.module.get_submodule(path) for path in inner], self.norm_eps),
            embeddings=embeddings,
            heads=heads,
        )
        _require_sites(settled, view.module, stream, chosen)
        return settled

    def wants(self, found: Sublayer, stream: ResidualStream, path: str) -> bool:
        """Whether a sublayer, whose site is ``path``, gets a bottleneck."""
        kinds = {"attention": self.mh_adapter, "mlp": self.output_adapter, "cross": self.cross_adapter}
        chosen = is_named(self.targets, path) if self.targets else kinds[found.kind]
        left = stream.blocks.index(found.block) in self.leave_out or bool(self.exclude and is_named(self.exclude, path))
        return chosen and not left and (not self.layers or find_layer_index(path, self.layers_pattern) in self.layers)


def _require_sites(
    variant: Bottleneck, model: nn.Module, stream: ResidualStream, chosen: Mapping[str, Sublayer]
) -> None:
    if not chosen and not variant.targets:
        raise SiteError(
            f"no sublayer was found in {type(model).__name__}: looked for sums, inside {len(stream.blocks)} blocks, of "
            "what the block takes and what a module in it gives",
            next_step="name modules in targets=, and in residuals= what each of them is added to",
            code="site_unsupported",
        )
    lacking = [path for path, found in chosen.items() if found.norm and path not in variant.residuals]
    if lacking:
        raise SiteError(
            f"what is added in front of '{lacking[0]}' is taken by no module of its block, so that it has no name",
            next_step="name it in residuals=, or narrow targets=",
            code="site_unsupported",
        )


def _placeholder_site() -> Site:
    """A site of which nothing is known."""
    return Site("", SiteKind.BLOCK, 1, 1, torch.float32, None)
