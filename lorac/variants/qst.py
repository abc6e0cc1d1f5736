"""QST: a narrow side network reads the output of each block of a frozen model and is mixed in at its last norm.

"Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized Large Language Models", Zhang et al. 2024, arXiv
2401.07159. Nothing before the last norm needs gradients, so that training stores no activations of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import nn

from lorac.argument_types import Bounds, Count, OneOf, Positive
from lorac.errors import AdapterError, missing_site_error
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.patterns import find_outermost_blocks, is_named
from lorac.variants.base import BranchVariant, Context, Params, ParamSpec, Site, SiteKind, Tensor
from lorac.variants.initialisers import kaiming_uniform, ones, uniform, zeros

_NAMING_HINT = "name the norm, such as targets=['model.norm'], and in blocks= the blocks that the side network reads"


@dataclass(frozen=True, kw_only=True)
class QST(BranchVariant):
    """``y' = a·y + (1 − a)·(U·N(g_N) + b)``, g_n = S_n((1 − β_n)·D_n(h_n) + β_n·g_{n−1}), g_0 = D_0(h_0).

    y (…, length, d) is the output of the model's last norm, h_0 the input of its first block, h_n the output of block
    n; no gradient flows into h. D are downsamplers to the width d/r, β_n = sigmoid(γ_n), and S_n is a decoder layer of
    that width: attention with rotary positions and a gated MLP, each after an RMS norm. N is an RMS norm, U (d, d/r).
    a starts at 1, where y' equals y bit for bit. ``QST.of(model)`` reads the fields from a model.

    Attributes:
        targets: the model's last norm.
        blocks: paths of the model's blocks, in order.
        heads: number of attention heads in S_n, as in the model.
        intermediate: width of the model's MLPs; the MLP of S_n has the width intermediate // r.
        r: the side network's width is d/r.
        bottleneck: rank of the downsamplers ``"adapter"`` and ``"lora"``.
        downsample: the kind of D: ``"adapter"``, a SiLU bottleneck and a LayerNorm; ``"lora"``, only the two factors;
            ``"linear"``, one matrix; or, without parameters, ``"max"`` or ``"avg"`` of r neighbouring features.
        kv_heads: number of heads of keys and values; None for ``heads``.
        causal: whether tokens attend only to earlier tokens and themselves.
        rope_theta: base of the rotary positions.
        mask: the argument of the model's forward that marks non-padding tokens (batch, length); every call must give
            it. None for calls without padding, or with padding on the right of a causal model.
        dropout: rate of the dropout on the downsamplers' input, in training.
        vectors: whether γ and a are vectors with a value per feature; else they are numbers.
        sigmoid: whether a is the sigmoid of its tensor, as in the authors' code; a then starts at 0.73.
        own_first: whether D_0 is a separate downsampler; else D_0 = D_1, as in the authors' code.
        eps: eps of the RMS norms.
    """

    targets: str | Sequence[str] = ("norm",)
    blocks: Sequence[str]
    heads: Count
    intermediate: Count
    r: Count = 16
    bottleneck: Count = 16
    downsample: Annotated[str, OneOf(_DOWNSAMPLERS)] = "adapter"
    kv_heads: Count | None = None
    causal: bool = True
    rope_theta: Positive = 10000.0
    mask: str | None = None
    dropout: float = 0.0
    vectors: bool = False
    sigmoid: bool = False
    own_first: bool = True
    eps: Annotated[float, Bounds(0)] = 1e-6

    name = "qst"
    paper = "Quantized Side Tuning, arXiv 2401.07159"
    kinds = frozenset({SiteKind.BLOCK})

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]  # it depends on causal
        """Whether tokens attend to later tokens, which no cache stores."""
        return not self.causal

    def reads(self, site: Site) -> tuple[str, ...]:
        mask = () if self.mask is None else (f"input:{self.mask}",)
        return (f"in:{self.blocks[0]}", *self.blocks, *mask)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        d = site.out_features
        h, groups = d // self.r, self.kv_heads or self.heads
        if not self.blocks or d % self.r or h % (2 * self.heads) or self.heads % groups or self.intermediate < self.r:
            raise AdapterError(
                f"QST cannot build a side network of width {d}/r with {self.heads} heads of even size, {groups} of "
                f"them for keys, and MLPs of width {self.intermediate}/r, for r={self.r} and {len(self.blocks)} blocks",
                next_step=f"give an r= that divides {d} / (2·heads), or other heads= (lorac.QST.of reads them)",
            )
        specs: dict[str, ParamSpec] = {}
        for n in range(len(self.blocks) + 1):
            specs |= self._down(n, d, h) if n or self.own_first else {}
            specs |= self._layer(n, h) if n else {}
        return {
            **specs,
            "norm": _scale_spec(h),
            "up_weight": ParamSpec((d, h), kaiming_uniform),
            "up_bias": ParamSpec((d,), uniform(h**-0.5)),
            "alpha": _scale_spec(d if self.vectors else 1),
        }

    def _down(self, n: int, d: int, h: int) -> dict[str, ParamSpec]:
        """Return the tensors of D_n."""
        if self.downsample in _POOLS:
            return {}
        if self.downsample == "linear":
            return {f"down_{n}": ParamSpec((h, d), kaiming_uniform)}
        pair = {f"down_{n}_A": ParamSpec((self.bottleneck, d), kaiming_uniform)}
        pair[f"down_{n}_B"] = ParamSpec((h, self.bottleneck), kaiming_uniform)
        if self.downsample == "lora":
            return pair
        shift = ParamSpec((h,), zeros, decay=False)
        return {**pair, f"down_{n}_norm_weight": _scale_spec(h), f"down_{n}_norm_bias": shift}

    def _layer(self, n: int, h: int) -> dict[str, ParamSpec]:
        """Return the tensors of γ_n and S_n."""
        key_width, mlp_width = h // self.heads * (self.kv_heads or self.heads), self.intermediate // self.r
        shapes = {"q": (h, h), "k": (key_width, h), "v": (key_width, h), "o": (h, h)}
        shapes |= {"gate": (mlp_width, h), "up": (mlp_width, h), "down": (h, mlp_width)}
        return {
            f"gamma_{n}": ParamSpec((h if self.vectors else 1,), zeros, decay=False),
            f"side_{n}_input_norm": _scale_spec(h),
            f"side_{n}_post_norm": _scale_spec(h),
            **{f"side_{n}_{key}": ParamSpec(shape, kaiming_uniform) for key, shape in shapes.items()},
        }

    def starts_as_base(self, site: Site) -> bool:
        return not self.sigmoid

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        first, *rest = (ctx.value(name).detach() for name in (f"in:{self.blocks[0]}", *self.blocks))
        # Cosines and sines (…, length, size) of rotary positions, of which only differences affect results.
        size = y.shape[-1] // self.r // self.heads
        rates = self.rope_theta ** (torch.arange(0, size, 2, device=first.device).to(first.dtype) / -size)
        angles = ctx.positions(first).to(first.dtype)[..., None] * rates
        angles = torch.cat([angles, angles], -1)
        rotary = angles.cos(), angles.sin()
        g = self._downsample(first, p, 0 if self.own_first else 1, ctx)
        for n, h in enumerate(rest, start=1):
            beta = torch.sigmoid(getattr(p, f"gamma_{n}"))
            g = self._side((1 - beta) * self._downsample(h, p, n, ctx) + beta * g, p, n, rotary, ctx)
        side = F.linear(_rms(g, p.norm, self.eps), p.up_weight, p.up_bias)
        return y + (1 - (torch.sigmoid(p.alpha) if self.sigmoid else p.alpha)) * (side - y)

    def _downsample(self, h: Tensor, p: Params, n: int, ctx: Context) -> Tensor:
        """Return D_n(h) (…, d/r) for h (…, d)."""
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

    def _side(self, u: Tensor, p: Params, n: int, rotary: tuple[Tensor, Tensor], ctx: Context) -> Tensor:
        """Return S_n(u), of the shape of u (…, length, d/r)."""
        w = {key: getattr(p, f"side_{n}_{key}") for key in ("q", "k", "v", "o", "gate", "up", "down")}
        z, groups = _rms(u, getattr(p, f"side_{n}_input_norm"), self.eps), self.kv_heads or self.heads
        q = _rotate(_split_heads(F.linear(z, w["q"]), self.heads), rotary)
        k = _rotate(_split_heads(F.linear(z, w["k"]), groups), rotary)
        v = _split_heads(F.linear(z, w["v"]), groups)
        mask = None if self.mask is None else ctx.value(f"input:{self.mask}")
        u = u + F.linear(ctx.attend(q, k, v, causal=self.causal, mask=mask).flatten(-2), w["o"])
        z = _rms(u, getattr(p, f"side_{n}_post_norm"), self.eps)
        return u + F.linear(F.silu(F.linear(z, w["gate"])) * F.linear(z, w["up"]), w["down"])

    @staticmethod
    def of(model: nn.Module, **fields: Any) -> QST:
        """Return the side network of a model; its last norm, blocks and sizes are read from structure and config.

        Args:
            **fields: fields of the variant, which replace the values read from the model.

        Raises:
            SiteError: the structure does not determine the norm or the blocks.
            AdapterError: the config does not give the number of attention heads.
        """
        view, targets = ModelView.of(model), fields.pop("targets", None)
        sites = view.sites
        outermost = find_outermost_blocks(sites)
        chains: dict[str, list[str]] = {}  # path of a list of blocks -> its blocks, in the model's order
        for path in (path for path in sites if path in outermost):
            chains.setdefault(path.rpartition(".")[0], []).append(path)
        named = [] if targets is None else [path for path in view.callable_paths if is_named(targets, path)]
        if targets is not None and len(named) != 1:
            raise missing_site_error(
                f"QST's targets={targets!r} names {len(named)} modules, not only the last norm", next_step=_NAMING_HINT
            )
        norm = _last_norm(model, chains) if targets is None else named[0]
        parent = norm.rpartition(".")[0]
        siblings = [chain for holder, chain in chains.items() if holder.rpartition(".")[0] == parent]
        if len(siblings) != 1 and "blocks" not in fields:
            raise missing_site_error(
                f"QST needs one list of blocks next to '{norm}', and found {len(siblings)}", next_step=_NAMING_HINT
            )
        blocks = tuple(fields.pop("blocks", None) or siblings[0])
        # A regular expression, since a name in a list also matches suffixes of other paths, such as of blocks' norms.
        return QST(targets=re.escape(norm), blocks=blocks, **{**_read_sizes(model, blocks[0], sites, fields), **fields})


_POOLS = {"max": lambda parts: parts.amax(-1), "avg": lambda parts: parts.mean(-1)}
"""Downsamplers without parameters: (…, d/r, r) -> (…, d/r)."""
_DOWNSAMPLERS = ("adapter", "lora", "linear", *_POOLS)


def _scale_spec(size: int) -> ParamSpec:
    """Return the spec of a scale, which is excluded from weight decay."""
    return ParamSpec((size,), ones, decay=False)


def _rms(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), scale, eps)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """Reshape (…, length, width) to (…, heads, length, size)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = (table.unsqueeze(-3) for table in rotary)
    return x * cos + torch.cat([-second, first], -1) * sin


def _last_norm(model: nn.Module, chains: Mapping[str, list[str]]) -> str:
    """Return the path of the norm next to a list of blocks; of several norms, the one after the list."""
    order = [path for path, _ in model.named_modules()]
    found, after = list[str](), list[str]()
    for holder in chains:
        parent = holder.rpartition(".")[0]
        for leaf, module in model.get_submodule(parent).named_children():
            weight = module._parameters.get("weight")
            if isinstance(weight, Tensor) and weight.dim() == 1:  # a scale
                path = f"{parent}.{leaf}" if parent else leaf
                found.append(path)
                after += [path] if order.index(path) > order.index(holder) else []
    chosen = found if len(found) == 1 else after
    if len(chosen) != 1:
        seen = ", ".join(f"'{path}'" for path in chosen) or "none"
        raise missing_site_error(
            f"QST needs one last norm next to a list of blocks, and found {seen}", next_step=_NAMING_HINT
        )
    return chosen[0]


def _read_sizes(model: Any, block: str, sites: Mapping[str, Site], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Read the heads from the model's config, and the MLPs' width: the widest input of a layer in a block."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = fields.get("heads") or getattr(config, "num_attention_heads", None)
    if heads is None:
        raise AdapterError("QST cannot find the number of attention heads in the config", next_step="give heads=")
    layers = model.get_submodule(block).named_modules(prefix=block)
    # A layer with a quantised weight may not be a site.
    widths = [
        sites.get(path, layer).in_features
        for path, layer in layers
        if isinstance(layer, nn.Linear) or (path in sites and path != block)
    ]
    groups = None if "heads" in fields else getattr(config, "num_key_value_heads", None)
    return {"heads": heads, "kv_heads": groups, "intermediate": max(widths, default=0)}
