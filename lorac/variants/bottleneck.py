"""AdapterHub's bottleneck adapters: Houlsby, Pfeiffer, He's parallel, Compacter, AdapterPlus, MAD-X.

Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020, arXiv 2005.00247 (AdapterFusion) and 2005.00052 (MAD-X);
He et al. 2021, arXiv 2110.04366; Mahabadi et al. 2021, arXiv 2106.04647. The fields are those of ``BnConfig``.

Their sites are found by structure (``lorac.frontend.residual_stream``) in ``for_model``. Let h be a sublayer's output
and r the residual to which it is added. A pre-LN model computes h + r, and the site is the sublayer: y is h, and the
model adds r to y'. A post-LN model computes LN(h + r), and the site is that LayerNorm: x is h + r, y is LN(h + r), and
y' is the new residual stream.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F

from lorac.argument_types import Bounds, OneOf, Positive, Rate
from lorac.errors import ExampleInputsNeeded, SiteError, not_one_of
from lorac.frontend.model_view import ModelView
from lorac.frontend.residual_stream import (
    ResidualStream,
    Sublayer,
    find_common_norm_eps,
    find_stream_end,
    find_stream_start,
    find_sublayer_sites,
    trace_residual_stream,
)
from lorac.ir.sites.patterns import find_first_pattern, find_layer_index, is_named
from lorac.variants._bottleneck_layers import (
    ACTIVATIONS,
    DOWN_UP,
    PRESETS,
    HypercomplexFields,
    apply_coupling,
    coupling_specs,
    drop_by_site,
    invert_coupling,
    narrow_width,
    plain_layer,
)
from lorac.variants.base import BranchVariant, Context, Params, ParamSpec, Site, SiteKind, Tensor
from lorac.variants.initialisers import normal, ones, zeros


@dataclass(frozen=True, kw_only=True)
class Bottleneck(HypercomplexFields, BranchVariant):
    """``h' = h + s·(U·act(D·z + p) + q)``, D (β, d), U (d, β), β = d // reduction_factor, z (…, d).

    Let r be the sublayer's residual and LN the LayerNorm of a post-LN model, else the identity. Then z is h; with
    ``original_ln_before`` it is LN(h + r), with ``is_parallel`` r. The defaults are Houlsby's (``double_seq_bn``).

    Attributes:
        targets: sublayers, or the LayerNorms after them; empty: the sublayers that the next three fields choose, found
            by structure.
        mh_adapter, output_adapter, cross_adapter: adapt self-attentions, MLPs, cross-attentions.
        leave_out: indices of blocks without adapters.
        reduction_factor: d / β.
        reduction_pattern: module pattern -> reduction_factor of these modules.
        non_linearity: act.
        scaling: s: a number, ``"learned"`` (1,) or ``"channel"`` (d,).
        is_parallel: run in parallel to the sublayer, not after it.
        original_ln_before: z is the sum after the residual (and its norm, in a post-LN model).
        original_ln_after: the model adds its residual (and norm) after the adapter; else the adapter's output is the
            residual stream.
        residual_before_ln: the bottleneck's residual: True: h; False: z; ``"post_add"``: h + r.
        ln_before, ln_after: whether the adapter has a norm before D, and after U.
        adapter_residual_before_ln: add the bottleneck's residual before the norm after U.
        use_gating: multiply by the mean over positions of σ(g·z + b), per row (padding counts, as in AdapterHub).
        dropout: rate of the dropout after s, in training.
        stochastic_depth: rate at which rows skip the adapter, in training.
        init_weights: ``"bert"``, ``"mam_adapter"`` (starts as the base) or ``"houlsby"``.
        inv_adapter: ``"nice"``: an invertible block after the embeddings, inverted before the output layer.
        inv_adapter_reduction_factor: reduction factor of the invertible block's bottlenecks.
        residuals: site -> the program value that is r; found by structure.
        inner: LayerNorm that is a site -> the program value that is h; output layer among ``heads`` that undoes the
            invertible block in its own input -> that input; found by structure.
        norm_eps: eps of these LayerNorms; found by structure.
        embeddings, heads: sites of the invertible block and of its inverse; found by structure.
    """

    targets: str | Sequence[str] = ()
    mh_adapter: bool = True
    output_adapter: bool = True
    cross_adapter: bool = False
    leave_out: tuple[int, ...] = ()
    reduction_factor: Positive = 16.0
    reduction_pattern: Mapping[str, float] = field(default_factory=dict)
    non_linearity: Annotated[str, OneOf(ACTIVATIONS)] = "swish"
    scaling: Annotated[float | str, OneOf(("learned", "channel"))] = 1.0
    is_parallel: bool = False
    original_ln_before: bool = False
    original_ln_after: bool = True
    residual_before_ln: Annotated[bool | str, OneOf(("post_add",))] = True
    ln_before: bool = False
    ln_after: bool = False
    adapter_residual_before_ln: bool = False
    use_gating: bool = False
    dropout: float = 0.0
    stochastic_depth: Rate = 0.0
    init_weights: Annotated[str, OneOf(DOWN_UP)] = "bert"
    inv_adapter: Annotated[str | None, OneOf(("nice",))] = None
    inv_adapter_reduction_factor: Positive = 2.0
    residuals: Mapping[str, str] = field(default_factory=dict)
    inner: Mapping[str, str] = field(default_factory=dict)
    norm_eps: Annotated[float, Bounds(0)] = 1e-12
    embeddings: Sequence[str] = ()
    heads: Sequence[str] = ()

    name = "bottleneck"
    paper = "Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751"
    kinds = frozenset({SiteKind.BLOCK, SiteKind.LINEAR, SiteKind.EMBEDDING})
    identity_at_init = False
    patterned: ClassVar[Mapping[str, str]] = {"reduction_pattern": "reduction_factor"}

    @staticmethod
    def preset(name: str, **fields: object) -> "Bottleneck":
        """Return one of AdapterHub's named configurations, such as ``"seq_bn"``, with these fields changed.

        Raises:
            OptionError: AdapterHub has no configuration of that name.
        """
        if name not in PRESETS:
            raise not_one_of("AdapterHub has no configuration", name, PRESETS)
        return Bottleneck(**{**PRESETS[name], **fields})  # type: ignore[arg-type]  # checked by Bottleneck

    def reads(self, site: Site) -> tuple[str, ...]:
        path = site.path
        if self._couples(path):
            return (f"weight:{path}",) if self._is_norm(path) else ()
        norm = (f"param:{path}.weight", f"param:{path}.bias") if self._is_norm(path) else ()
        return (*norm, *(name for name in map(self._value_name, self._operands(path), [path] * 2) if name is not None))

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        path = ctx.site.path
        if self._couples(path):
            act = ACTIVATIONS[self.non_linearity]
            if find_first_pattern(self.embeddings, path):
                return apply_coupling(y, p, act)
            if not self._is_norm(path):
                return invert_coupling(y, p, act)
            return y + F.linear(invert_coupling(x, p, act) - x, ctx.value(f"weight:{path}"))
        return self._after_norm(x, y, p, ctx) if self._is_norm(path) else self._at_sublayer(x, y, p, ctx)

    def _at_sublayer(self, x: Tensor, h: Tensor, p: Params, ctx: Context) -> Tensor:
        """Return y', to which the model adds r; without ``original_ln_after`` y' contains −r, unless r cancels."""
        r = self._operand("r", ctx)
        after = h if r is None else h + r
        z = (x if r is None else r) if self.is_parallel else after if self.original_ln_before else h
        with_r, inside = self._residual_kind != "h", self._adds_inside
        residual = after if with_r else h
        body = self._body(z, residual if inside else None, p, ctx)
        if r is None:
            return body if inside else body + residual
        factor = (with_r and not inside) - (not self.original_ln_after)
        total = body if inside else body + h
        return total if factor == 0 else total + factor * r

    def _after_norm(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        """Return the new residual stream, where x is h + r and y its norm."""
        h, r = self._operand("h", ctx), self._operand("r", ctx)
        z = r if self.is_parallel else y if self.original_ln_before else h
        residual = {"h": h, "z": z, "sum": x}[self._residual_kind]
        inside = self._adds_inside
        body = self._body(z, residual if inside else None, p, ctx)
        if not self.original_ln_after:
            return body if inside else body + residual
        if inside or self._residual_kind == "z":
            total = body + r if inside else body + z + r
        else:
            total = body + x if self._residual_kind == "h" else body + x + r
        weight, bias = (ctx.value(f"param:{ctx.site.path}.{leaf}") for leaf in ("weight", "bias"))
        return F.layer_norm(total, (total.shape[-1],), weight, bias, self.norm_eps)

    def _body(self, z: Tensor, residual: Tensor | None, p: Params, ctx: Context) -> Tensor:
        """Return s·(U·act(D·z + p) + q), with norms, dropout, gate and residual as configured."""
        width = (z.shape[-1],)
        normed = F.layer_norm(z, width, p.norm_before, p.norm_before_bias) if self.ln_before else z
        up = self.apply_layer(ACTIVATIONS[self.non_linearity](self.apply_layer(normed, p, "down")), p, "up")
        if not self.is_parallel:
            up = drop_by_site(up, self.stochastic_depth, ctx, (*up.shape[:1], *(1,) * (up.dim() - 1)))
        up = up * (p.scaling if isinstance(self.scaling, str) else self.scaling)
        up = drop_by_site(up, self.dropout, ctx, up.shape)
        if self.use_gating:
            up = up * torch.sigmoid(F.linear(z, p.gate, p.gate_bias)).mean(-2, keepdim=True)
        if residual is not None:
            up = up + residual
        return F.layer_norm(up, width, p.norm_after, p.norm_after_bias) if self.ln_after else up

    @property
    def _residual_kind(self) -> str:
        """The bottleneck's residual: ``"h"``, ``"sum"`` (h + r) or ``"z"`` (the norm of that sum)."""
        if self.is_parallel or self.residual_before_ln is True:
            return "h"
        if self.residual_before_ln == "post_add":
            return "sum"
        return "z" if self.original_ln_before else "h"

    @property
    def _adds_inside(self) -> bool:
        """Whether the bottleneck's residual is added before the adapter's last norm."""
        return self.adapter_residual_before_ln and not self.is_parallel

    def _operands(self, path: str) -> tuple[str, ...]:
        """Return the operands among h and r that the formula reads besides x and y."""
        only_h, inside = self._residual_kind == "h", self._adds_inside
        if not self._is_norm(path):
            needed = self.is_parallel or self.original_ln_before or not only_h or not self.original_ln_after
            return ("r",) if needed else ()
        h = not (self.is_parallel or self.original_ln_before) or (only_h and (inside or not self.original_ln_after))
        r = self.is_parallel or (self.original_ln_after and (inside or not only_h))
        return ("h",) * h + ("r",) * r

    def _value_name(self, operand: str, path: str) -> str | None:
        """Return the name of the program value that is h or r at a site; None without one."""
        names = self.residuals if operand == "r" else self.inner
        key = find_first_pattern(names, path)
        return None if key is None else names[key]

    def _operand(self, operand: str, ctx: Context) -> Any:
        name = self._value_name(operand, ctx.site.path) if operand in self._operands(ctx.site.path) else None
        return None if name is None else ctx.value(name)

    def _is_norm(self, path: str) -> bool:
        return find_first_pattern(self.inner, path) is not None

    def _couples(self, path: str) -> bool:
        return find_first_pattern((*self.embeddings, *self.heads), path) is not None

    def check(self, site: Site) -> None:
        super().check(site)
        if site.kind is SiteKind.EMBEDDING and not self._couples(site.path):
            raise SiteError(
                f"a bottleneck follows a sublayer, and '{site.path}' is an embedding",
                next_step='narrow targets=; inv_adapter="nice" puts an invertible block there',
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        width = site.out_features
        if self._couples(site.path):
            coupled = site.in_features if self._is_norm(site.path) else width
            return coupling_specs(coupled, self.inv_adapter_reduction_factor)
        inputs = site.in_features if self.is_parallel and self._value_name("r", site.path) is None else width
        specs = self._layers(site, inputs, max(1, narrow_width(width, self.reduction_factor)))
        for name, present, size in (("norm_before", self.ln_before, inputs), ("norm_after", self.ln_after, width)):
            if present:
                specs |= {name: ParamSpec((size,), ones), f"{name}_bias": ParamSpec((size,), zeros)}
        if isinstance(self.scaling, str):
            specs["scaling"] = ParamSpec((1 if self.scaling == "learned" else width,), ones)
        return specs | (plain_layer("gate", inputs, 1, normal(0.02)) if self.use_gating else {})

    def starts_as_base(self, site: Site) -> bool:
        if self._couples(site.path) or self._is_norm(site.path) or self.phm_layer or self.ln_after:
            return False
        cancels = (self._residual_kind != "h") == (not self.original_ln_after)
        return self.init_weights == "mam_adapter" and (cancels or self._value_name("r", site.path) is None)

    def _layers(self, site: Site, inputs: int, narrow: int) -> dict[str, ParamSpec]:
        if not self.phm_layer:
            down, up = DOWN_UP[self.init_weights]
            return plain_layer("down", inputs, narrow, down) | plain_layer("up", narrow, site.out_features, up)
        sizes = (inputs, narrow, site.out_features)
        if any(size % self.phm_dim for size in sizes):
            raise SiteError(
                f"phm_dim={self.phm_dim} does not divide all sizes of the bottleneck at '{site.path}', {inputs} -> "
                f"{narrow} -> {site.out_features}",
                next_step="give another phm_dim or reduction_factor",
            )
        return self.hypercomplex_layer("down", inputs, narrow) | self.hypercomplex_layer(
            "up", narrow, site.out_features
        )

    def for_model(self, view: ModelView, inputs: object = None) -> "Bottleneck":
        needs_stream = not self.targets or self.inv_adapter is not None or bool(self._operands(""))
        try:
            stream = trace_residual_stream(view, inputs)
        except ExampleInputsNeeded:
            if needs_stream and not self.residuals:
                raise
            return self
        return self.for_stream(view, stream)

    def for_stream(self, view: ModelView, stream: ResidualStream, *, inverts: bool = True) -> "Bottleneck":
        """Choose this method's sites in a model's residual stream; return the method with these fields.

        Args:
            inverts: whether an invertible block is inverted before the output layer.

        Raises:
            SiteError: no sublayer is found, a residual has no name, or one module would be two kinds of site.
        """
        sublayers = find_sublayer_sites(view, stream)
        chosen = {path: sublayer for path, sublayer in sublayers.items() if self.selects(sublayer, stream, path)}
        inner = {path: sublayer.modules[-1] for path, sublayer in chosen.items() if sublayer.norm}
        norms = [view.module.get_submodule(path) for path in inner]
        residuals = {path: f"in:{sublayer.residual}" for path, sublayer in chosen.items() if sublayer.residual}
        embeddings, heads = self.embeddings, self.heads
        if self.inv_adapter is not None and not embeddings:
            embeddings = (find_stream_start(view, stream),)
            end = find_stream_end(view, stream, chosen) if inverts else None
            heads = () if end is None else (end[0],)
            inner |= {end[0]: f"in:{end[0]}"} if end is not None and end[1] else {}
        variant = dataclasses.replace(
            self,
            targets=self.targets or (*chosen, *embeddings, *heads),
            inner=inner | dict(self.inner),
            residuals=residuals | dict(self.residuals),
            norm_eps=find_common_norm_eps(norms, self.norm_eps),
            embeddings=embeddings,
            heads=heads,
        )
        if not chosen and not variant.targets:
            raise SiteError(
                f"no sublayer was found in {type(view.module).__name__}: none of its {len(stream.blocks)} blocks adds "
                "a module's output to the block's input",
                next_step="name modules in targets=, and in residuals= the value to which each output is added",
            )
        twice = [path for path in chosen if variant._couples(path)]
        if twice:
            raise SiteError(
                f"'{twice[0]}' would get a bottleneck and the invertible block or its inverse, and one would be lost",
                next_step="name other modules in embeddings= and heads=, or narrow targets=",
            )
        unnamed = [path for path, sublayer in chosen.items() if sublayer.norm and path not in variant.residuals]
        if unnamed:
            raise SiteError(
                f"the residual that is added before '{unnamed[0]}' is not the input of a module, and so has no name",
                next_step="name it in residuals=, or narrow targets=",
            )
        return variant

    def selects(self, sublayer: Sublayer, stream: ResidualStream, path: str) -> bool:
        """Return whether the sublayer whose site is ``path`` gets a bottleneck."""
        kinds = {"attention": self.mh_adapter, "mlp": self.output_adapter, "cross": self.cross_adapter}
        chosen = is_named(self.targets, path) if self.targets else kinds[sublayer.kind]
        skipped = stream.blocks.index(sublayer.block) in self.leave_out
        excluded = bool(self.exclude) and is_named(self.exclude, path)
        in_layers = not self.layers or find_layer_index(path, self.layers_pattern) in self.layers
        return chosen and not skipped and not excluded and in_layers
