"""Methods of a few lines at modules of every kind, as an author of a variant writes them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lorac
from lorac import ParamSpec, SiteKind
from lorac.variants import initialisers
from lorac.variants._mixtures import top_k_softmax

BLOCK = frozenset({SiteKind.BLOCK})


def drawn(*shape, shared=False):
    return ParamSpec(shape, initialisers.normal(shape[-1] ** -0.5), shared=shared)


@dataclass(frozen=True, kw_only=True)
class Bottleneck(lorac.BranchVariant):
    """Houlsby's: y' = y + U·SiLU(D·y), behind attention and MLP."""

    targets: str | tuple[str, ...] = ("self_attn", "mlp")
    r: int = 3
    name, kinds = "test-bottleneck", BLOCK

    def params(self, site):
        return {"down": drawn(self.r, site.out_features), "up": drawn(site.out_features, self.r)}

    def branch(self, x, y, p, ctx):
        return y + F.linear(F.silu(F.linear(y, p.down)), p.up)


@dataclass(frozen=True, kw_only=True)
class SideNetwork(lorac.BranchVariant):
    """QST's: what the taps give, each through a matrix of its own, added to the last norm's output."""

    targets: tuple[str, ...] = ("model.norm",)
    taps: tuple[str, ...] = ("model.layers.0", "in:model.layers.1.mlp", "model.embed_tokens")
    name, kinds = "test-side", BLOCK

    def reads(self, site):
        return self.taps

    def params(self, site):
        return {f"up{i}": drawn(site.out_features, site.out_features) for i in range(len(self.taps))}

    def branch(self, x, y, p, ctx):
        side = (F.linear(torch.tanh(ctx.value(name)), getattr(p, f"up{i}")) for i, name in enumerate(self.taps))
        return y + sum(side)


@dataclass(frozen=True, kw_only=True)
class Experts(lorac.BranchVariant):
    """FlexMoRE's: experts of other ranks beside the MLP, whose own products are computed once for all of them."""

    targets: tuple[str, ...] = ("mlp",)
    ranks: tuple[int, ...] = (1, 3)
    wide: int = 48
    name, kinds, emits = "test-experts", BLOCK, ("router",)

    def reads(self, site):
        return (f"{site.path}.gate_proj", f"{site.path}.up_proj", f"weight:{site.path}.down_proj")

    def params(self, site):
        found, narrow = {"gate": drawn(1 + len(self.ranks), site.in_features)}, site.in_features
        sizes = {"g": (narrow, self.wide), "u": (narrow, self.wide), "d": (self.wide, narrow)}
        for e, rank in enumerate(self.ranks):
            found |= {f"{part}_A{e}": drawn(rank, size) for part, (size, _) in sizes.items()}
            found |= {f"{part}_B{e}": drawn(size, rank) for part, (_, size) in sizes.items()}
        return found

    def branch(self, x, y, p, ctx):
        logits = F.linear(x, p.gate)
        ctx.emit("router", logits)
        shares = top_k_softmax(logits, 2)
        gate, up, down = (ctx.value(name) for name in self.reads(ctx.site))
        total, hidden = shares[..., :1] * y, 0
        for e in range(len(self.ranks)):
            low = {part: self.low(p, part, e) for part in "gud"}
            h = shares[..., e + 1 : e + 2] * F.silu(gate + low["g"](x)) * (up + low["u"](x))
            total, hidden = total + low["d"](h), hidden + h
        return total + F.linear(hidden, down)

    def low(self, p, part, e):
        return lambda z: F.linear(F.linear(z, getattr(p, f"{part}_A{e}")), getattr(p, f"{part}_B{e}"))


@dataclass(frozen=True, kw_only=True)
class Routed(lorac.BranchVariant):
    """X-LoRA's: one classifier reads the base's last hidden state, once, and weighs the components at every site."""

    targets: tuple[str, ...] = ("q_proj", "v_proj")
    of: str = "model.norm"
    width: int = 32
    n: int = 3
    name, emits = "test-routed", ("gates",)

    def reads_once(self):
        return (f"base:{self.of}",)

    def reads(self, site):
        return ("own:gates",)

    def params(self, site):
        return {
            "classifier": drawn(self.n, self.width, shared=True),
            "lora_A": drawn(self.n, site.in_features),
            "lora_B": drawn(site.out_features, self.n),
        }

    def once(self, p, ctx):
        return {"gates": F.linear(ctx.value(f"base:{self.of}"), p.classifier).softmax(-1)}

    def branch(self, x, y, p, ctx):
        gates = ctx.value("own:gates")
        ctx.emit("gates", gates)
        return y + F.linear(F.linear(x, p.lora_A) * gates, p.lora_B)
