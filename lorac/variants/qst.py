"""QST: a narrow side network reads what every block of a frozen model gives, and is blended in at its last norm.

"Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized Large Language Models", Zhang et al. 2024, arXiv
2401.07159. Nothing before the last norm wants gradients, so training keeps no activations of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lorac.errors import AdapterError, SiteError, not_one_of
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.reduction import Params
from lorac.ir.patterns import find_outermost_blocks, is_named
from lorac.ir.sites import Site, SiteKind
from lorac.variants import _initialisers as _inits
from lorac.variants.base import BranchVariant, Context
from lorac.variants.params import Init, ParamSpec

Tensor = torch.Tensor
_NAMING_HINT = "say which it is: targets=['model.norm'], for one; blocks= are the paths of what the side network reads"


@dataclass(frozen=True, kw_only=True)
class QST(BranchVariant):
    """``y' = a·y + (1 − a)·(U·N(g_N) + b)``, g_n = S_n((1 − β_n)·D_n(h_n) + β_n·g_{n−1}), g_0 = D_0(h_0).

    y (…, length, d) is what the model's last norm gives, h_0 what its first block takes and h_n what block n gives; no
    gradient goes into h. D are downsamplers to the width d/r, β_n = sigmoid(γ_n), and S_n is a decoder layer of that
    width: attention with rotary positions and a gated MLP, each behind an RMS norm. N is an RMS norm, U (d, d/r). a
    starts at 1, where y' is y to the bit. ``QST.of(model)`` fills in what a model tells.

    Attributes:
        targets: the model's last norm.
        blocks: paths of the model's blocks, in order.
        heads: of the attention in S_n, as the model's.
        intermediate: width of the model's MLPs; those of S_n are an r-th of it.
        r: how much narrower the side network is.
        bottleneck: rank of the downsamplers ``"adapter"`` and ``"lora"``.
        downsample: what D is: ``"adapter"``, a SiLU bottleneck and a LayerNorm; ``"lora"``, the two factors alone;
            ``"linear"``, one matrix; or, without a parameter, ``"max"`` or ``"avg"`` of r neighbouring features.
        kv_heads: heads of keys and values; None for as many as ``heads``.
        causal: whether a token attends to none that come after it.
        rope_theta: base of the rotary positions.
        mask: which argument of the model's forward says what is no padding (batch, length); every call gives it then.
            None for calls without padding, or with padding on the right of a causal model.
        dropout: rate in training, of what the downsamplers read.
        vectors: whether each γ has a value for each feature, and a too; else they are numbers.
        own_first: whether D_0 is a downsampler of its own; else it is D_1, as in the authors' code.
        eps: of the RMS norms.
    """

    targets: str | tuple[str, ...] = ("norm",)
    blocks: tuple[str, ...]
    heads: int
    intermediate: int
    r: int = 16
    bottleneck: int = 16
    downsample: str = "adapter"
    kv_heads: int | None = None
    causal: bool = True
    rope_theta: float = 10000.0
    mask: str | None = None
    dropout: float = 0.0
    vectors: bool = False
    own_first: bool = True
    eps: float = 1e-6

    name: ClassVar[str] = "qst"
    paper: ClassVar[str] = "Quantized Side Tuning, arXiv 2401.07159"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.BLOCK})

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]  # a matter of how it attends
        """Of attention to what comes later no cache holds anything."""
        return not self.causal

    # ── What it is made of ───────────────────────────────────────────────────────────────────────────────────────────
    def reads(self, site: Site) -> tuple[str, ...]:
        asked = () if self.mask is None else (f"input:{self.mask}",)
        return (f"in:{self.blocks[0]}", *self.blocks, *asked)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        if self.downsample not in _DOWNSAMPLERS:
            raise not_one_of("QST has no downsampler", self.downsample, _DOWNSAMPLERS)
        d = site.out_features
        h = self._narrow(d)
        found: dict[str, ParamSpec] = {}
        for n in range(len(self.blocks) + 1):
            found |= self._down(n, d, h) if n or self.own_first else {}
            found |= self._layer(n, h) if n else {}
        return {
            **found,
            "norm": _scale_spec(h),
            "up_weight": ParamSpec((d, h), _inits.kaiming_uniform),
            "up_bias": ParamSpec((d,), _inits.uniform(h**-0.5)),
            "alpha": _scale_spec(d if self.vectors else 1),
        }

    def _narrow(self, d: int) -> int:
        """The side network's width, of which a head has an even number of features.

        Raises:
            AdapterError: the sizes do not divide.
        """
        h, groups = d // self.r, self.kv_heads or self.heads
        if not self.blocks or d % self.r or h % (2 * self.heads) or self.heads % groups or self.intermediate < self.r:
            raise AdapterError(
                f"qst: no side network of width {d}/r has {self.heads} heads, {groups} of them for keys, of an even "
                f"size, and MLPs of width {self.intermediate}/r, with r={self.r} and {len(self.blocks)} blocks",
                next_step=f"give an r= that divides {d} / (2·heads), or other heads= (lorac.QST.of has a model's)",
            )
        return h

    def _down(self, n: int, d: int, h: int) -> dict[str, ParamSpec]:
        """The tensors of D_n."""
        drawn = _inits.kaiming_uniform
        if self.downsample in _POOLS:
            return {}
        if self.downsample == "linear":
            return {f"down_{n}": ParamSpec((h, d), drawn)}
        pair = {f"down_{n}_A": ParamSpec((self.bottleneck, d), drawn)}
        pair[f"down_{n}_B"] = ParamSpec((h, self.bottleneck), drawn)
        if self.downsample == "lora":
            return pair
        shift = ParamSpec((h,), _inits.zeros, decay=False)
        return {**pair, f"down_{n}_norm_weight": _scale_spec(h), f"down_{n}_norm_bias": shift}

    def _layer(self, n: int, h: int) -> dict[str, ParamSpec]:
        """The tensors of γ_n and S_n."""
        keys, wide = h // self.heads * (self.kv_heads or self.heads), self.intermediate // self.r
        shapes = {"q": (h, h), "k": (keys, h), "v": (keys, h), "o": (h, h)}
        shapes |= {"gate": (wide, h), "up": (wide, h), "down": (h, wide)}
        return {
            f"gamma_{n}": ParamSpec((h if self.vectors else 1,), _inits.zeros, decay=False),
            f"side_{n}_input_norm": _scale_spec(h),
            f"side_{n}_post_norm": _scale_spec(h),
            **{f"side_{n}_{key}": ParamSpec(shape, _inits.kaiming_uniform) for key, shape in shapes.items()},
        }

    # ── What it computes ─────────────────────────────────────────────────────────────────────────────────────────────
    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        first, *rest = (ctx.value(name).detach() for name in (f"in:{self.blocks[0]}", *self.blocks))
        turns = _rotary_tables(ctx.positions(first), first, y.shape[-1] // self.r // self.heads, self.rope_theta)
        g = self._downsampled(first, p, 0 if self.own_first else 1, ctx)
        for n, h in enumerate(rest, start=1):
            beta = torch.sigmoid(getattr(p, f"gamma_{n}"))
            g = self._side((1 - beta) * self._downsampled(h, p, n, ctx) + beta * g, p, n, turns, ctx)
        side = F.linear(_rms(g, p.norm, self.eps), p.up_weight, p.up_bias)
        return y + (1 - p.alpha) * (side - y)

    def _downsampled(self, h: Tensor, p: Params, n: int, ctx: Context) -> Tensor:
        """D_n(h) (…, d/r) of h (…, d)."""
        if ctx.training and self.dropout:
            h = F.dropout(h, self.dropout, True)
        if self.downsample in _POOLS:
            return _POOLS[self.downsample](h.unflatten(-1, (-1, self.r)))
        if self.downsample == "linear":
            return F.linear(h, getattr(p, f"down_{n}"))
        a, b = (getattr(p, f"down_{n}_{key}") for key in "AB")
        if self.downsample == "lora":
            return F.linear(F.linear(h, a), b)
        scale, shift = (getattr(p, f"down_{n}_norm_{key}") for key in ("weight", "bias"))
        return F.layer_norm(F.linear(F.silu(F.linear(h, a)), b), (len(b),), scale, shift)

    def _side(self, u: Tensor, p: Params, n: int, turns: tuple[Tensor, Tensor], ctx: Context) -> Tensor:
        """S_n(u), like u (…, length, d/r)."""
        w = {key: getattr(p, f"side_{n}_{key}") for key in ("q", "k", "v", "o", "gate", "up", "down")}
        z, groups = _rms(u, getattr(p, f"side_{n}_input_norm"), self.eps), self.kv_heads or self.heads
        q = _rotate(_split_heads(F.linear(z, w["q"]), self.heads), turns)
        k = _rotate(_split_heads(F.linear(z, w["k"]), groups), turns)
        v = _split_heads(F.linear(z, w["v"]), groups)
        mask = None if self.mask is None else ctx.value(f"input:{self.mask}")
        u = u + F.linear(ctx.attend(q, k, v, causal=self.causal, mask=mask).flatten(-2), w["o"])
        z = _rms(u, getattr(p, f"side_{n}_post_norm"), self.eps)
        return u + F.linear(F.silu(F.linear(z, w["gate"])) * F.linear(z, w["up"]), w["down"])

    # ── A model's ────────────────────────────────────────────────────────────────────────────────────────────────────
    @staticmethod
    def of(model: nn.Module, **fields: Any) -> QST:
        """The side network of a model: its last norm, its blocks and their sizes, by its structure and its config.

        Args:
            model: the host.
            **fields: the variant's; what is given is not looked for.

        Raises:
            SiteError: the structure does not tell which norm, or which blocks, are meant.
            AdapterError: nothing tells how many heads its attention has.
        """
        view, targets = ModelView.of(model), fields.pop("targets", None)
        sites = view.sites
        chains = _chains(find_outermost_blocks(sites), sites)
        norm = _last_norm(model, chains) if targets is None else _find_named(view, targets)
        around = norm.rpartition(".")[0]
        beside = [chain for holder, chain in chains.items() if holder.rpartition(".")[0] == around]
        if len(beside) != 1 and "blocks" not in fields:
            raise SiteError(
                f"qst: beside '{norm}' are {len(beside)} lists of blocks, not one",
                next_step=_NAMING_HINT,
                code="site_not_found",
            )
        blocks = tuple(fields.pop("blocks", None) or beside[0])
        # Of a list, names are the ends of paths, and blocks may have norms of the same name.
        return QST(targets=re.escape(norm), blocks=blocks, **{**_read_sizes(model, blocks[0], sites, fields), **fields})


# ── Parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
_POOLS = {"max": lambda parts: parts.amax(-1), "avg": lambda parts: parts.mean(-1)}
"""Downsamplers without a parameter: (…, d/r, r) -> (…, d/r)."""
_DOWNSAMPLERS = ("adapter", "lora", "linear", *_POOLS)


def _scale_spec(size: int) -> ParamSpec:
    """What scales, and so is not to decay."""
    init: Init = lambda context: torch.ones(context.shape)  # noqa: E731  (a start value)
    return ParamSpec((size,), init, decay=False)


def _rms(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), scale, eps)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(…, length, width) as (…, heads, length, size)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _rotary_tables(positions: Tensor, h: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (…, length, size) of rotary positions, of which only differences matter."""
    rates = theta ** (torch.arange(0, size, 2, device=h.device).to(h.dtype) / -size)
    angles = positions.to(h.dtype)[..., None] * rates
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    one, other = x.chunk(2, -1)
    cos, sin = (turn.unsqueeze(-3) for turn in turns)
    return x * cos + torch.cat([-other, one], -1) * sin


# ── What a model tells ───────────────────────────────────────────────────────────────────────────────────────────────
def _chains(paths: set[str], sites: Mapping[str, Site]) -> dict[str, list[str]]:
    """Blocks in the model's order, by the path of the list that holds them."""
    found: dict[str, list[str]] = {}
    for path in (path for path in sites if path in paths):
        found.setdefault(path.rpartition(".")[0], []).append(path)
    return found


def _last_norm(model: nn.Module, chains: Mapping[str, list[str]]) -> str:
    """The norm beside a list of blocks; of several the one that comes after it."""
    order = [path for path, _ in model.named_modules()]
    found, behind = list[str](), list[str]()
    for holder in chains:
        for path in _adjacent_norms(model, holder):
            found.append(path)
            behind += [path] if order.index(path) > order.index(holder) else []
    chosen = found if len(found) == 1 else behind
    if len(chosen) != 1:
        seen = ", ".join(f"'{path}'" for path in chosen) or "none"
        raise SiteError(
            f"qst: looked for one norm beside a list of blocks, the last of the model, and found {seen}",
            next_step=_NAMING_HINT,
            code="site_not_found",
        )
    return chosen[0]


def _find_named(view: ModelView, targets: str | tuple[str, ...] | list[str]) -> str:
    """The path of the one module that is named."""
    found = [path for path in view.callable_paths if is_named(targets, path)]
    if len(found) != 1:
        raise SiteError(
            f"qst: targets={targets!r} names {len(found)} modules, not the last norm",
            next_step=_NAMING_HINT,
            code="site_not_found",
        )
    return found[0]


def _adjacent_norms(model: nn.Module, holder: str) -> Iterator[str]:
    """Paths of the modules beside another whose one parameter, or first of two, is a scale."""
    parent = holder.rpartition(".")[0]
    for leaf, module in model.get_submodule(parent).named_children():
        weight = module._parameters.get("weight")
        if isinstance(weight, Tensor) and weight.dim() == 1:
            yield f"{parent}.{leaf}" if parent else leaf


def _read_sizes(model: Any, block: str, sites: Mapping[str, Site], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Heads by the model's config, and the width of its MLPs: the widest of what the layers of a block take."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = fields.get("heads") or getattr(config, "num_attention_heads", None)
    if heads is None:
        raise AdapterError("qst: nothing tells how many heads the model's attention has", next_step="give heads=")
    layers = model.get_submodule(block).named_modules(prefix=block)
    # A layer whose weight is in codes may be no site.
    inside = [
        (sites.get(path, layer)).in_features
        for path, layer in layers
        if isinstance(layer, nn.Linear) or (path in sites and path != block)
    ]
    groups = None if "heads" in fields else getattr(config, "num_key_value_heads", None)
    return {"heads": heads, "kv_heads": groups, "intermediate": max(inside, default=0)}
