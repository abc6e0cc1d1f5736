"""Spike: FlexMoRE (arXiv 2602.08818). A route over whole blocks: experts of different rank under one gate."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lorac
from lorac.ir.host.sites import SiteKind
from lorac.variants import _inits
from lorac.variants._routing import top_k
from lorac.variants.params import ParamSpec
from tests.parity import assert_parity
from tests.variants.away import away

D, H, RANKS, K = 6, 9, (1, 3, 2), 2  # expert 0 is the block itself


@dataclass(frozen=True, kw_only=True)
class FlexMoRE(lorac.BranchVariant):
    targets: str = "all-blocks"
    name, paper, kinds = "spike-flexmore", "arXiv 2602.08818", frozenset({SiteKind.BLOCK})

    def reads(self, site):
        return ("ffn.0.0", "weight:ffn.0.2")

    def params(self, site):
        shapes = {"gate": (1 + len(RANKS), D)}
        for e, r in enumerate(RANKS):
            shapes |= {f"first_A{e}": (r, D), f"up_first{e}": (H, r), f"last_A{e}": (r, H), f"up_last{e}": (D, r)}
        return {key: ParamSpec(shape, _inits.kaiming_uniform) for key, shape in shapes.items()}

    def branch(self, x, y, p, ctx):
        shares = F.linear(x, p.gate).softmax(-1)
        shares = shares * top_k(shares, K)  # not renormalised
        total, hidden, last = shares[..., :1] * y, ctx.value("ffn.0.0"), ctx.value("weight:ffn.0.2")
        for e in range(len(RANKS)):
            first = F.linear(F.linear(x, getattr(p, f"first_A{e}")), getattr(p, f"up_first{e}"))
            h = F.silu(hidden + first)
            out = F.linear(h, last) + F.linear(F.linear(h, getattr(p, f"last_A{e}")), getattr(p, f"up_last{e}"))
            total = total + shares[..., e + 1 : e + 2] * out
        return total


def test_a_route_over_blocks():
    layers = (torch.nn.Linear(D, H, bias=False), torch.nn.SiLU(), torch.nn.Linear(H, D, bias=False))
    block, x = torch.nn.Sequential(*layers), torch.randn(3, 5, D)
    host = torch.nn.Sequential(OrderedDict(ffn=torch.nn.Sequential(block))).eval()
    adapter, base = away(FlexMoRE(), host, (x,), "e", share=0.43), host(x).detach()
    p = adapter.tensors["ffn.0"]
    shares, experts = (x @ p["gate"].T).softmax(-1), [block(x)]
    for e in range(len(RANKS)):  # by hand: every expert's weights merged
        first, last = (p[f"up_{part}{e}"] @ p[f"{part}_A{e}"] for part in ("first", "last"))
        experts.append(F.silu(x @ (block[0].weight + first).T) @ (block[2].weight + last).T)
    shares = shares.scatter(-1, shares.topk(4 - K, largest=False).indices, 0)
    y = (shares.unsqueeze(-1) * torch.stack(experts, -2)).sum(-2).detach()
    assert_parity(lorac.compile(host, {"e": adapter})(x), y, base)
    emitted = lorac.compile(host, {"e": adapter}, target="onnxruntime", example_inputs=(x,))
    assert_parity(emitted(x), y, base, own_base=emitted(x, adapters=None))
