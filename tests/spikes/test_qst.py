"""Spike: QST (arXiv 2401.07159). A narrow side network reads the blocks' outputs and is blended into the last one."""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import lorac
from lorac.ir.host.sites import SiteKind
from lorac.variants import _inits
from lorac.variants.params import ParamSpec
from tests.parity import assert_parity
from tests.variants.away import away

D, H, N = 6, 3, 3


@dataclass(frozen=True, kw_only=True)
class SideNetwork(lorac.BranchVariant):
    targets: tuple[str, ...] = (f"blocks.{N - 1}",)
    name, paper, kinds = "spike-qst", "arXiv 2401.07159", frozenset({SiteKind.BLOCK})

    def reads(self, site):
        return tuple(f"blocks.{n}" for n in range(N - 1))

    def params(self, site):
        shapes = {"up": (D, H), "gamma": (N,)} | {f"down{n}": (H, D) for n in range(N)}
        shapes |= {f"side{n}": (H, H) for n in range(N)}
        return {key: ParamSpec(shape, _inits.zeros) for key, shape in shapes.items()}

    def branch(self, x, y, p, ctx):
        taps = [*(ctx.value(name) for name in self.reads(ctx.site)), y]
        side = torch.zeros_like(taps[0][..., :H])
        for n, tap in enumerate(taps):
            beta = torch.sigmoid(p.gamma[n])
            blended = (1 - beta) * F.linear(tap, getattr(p, f"down{n}")) + beta * side
            side = torch.tanh(F.linear(blended, getattr(p, f"side{n}")))
        return y + F.linear(side, p.up)


def test_a_side_network_reads_every_block():
    blocks = (torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Tanh()) for _ in range(N))
    host = torch.nn.Sequential(OrderedDict(blocks=torch.nn.Sequential(*blocks))).eval()
    x = torch.randn(3, 5, D)
    adapter = away(SideNetwork(), host, (x,), "side")
    p, y, side = adapter.tensors[f"blocks.{N - 1}"], x, torch.zeros(3, 5, H)
    for n, block in enumerate(host.blocks):
        y, beta = block(y), torch.sigmoid(p["gamma"][n])
        side = torch.tanh(((1 - beta) * (y @ p[f"down{n}"].T) + beta * side) @ p[f"side{n}"].T)
    y, base = (y + side @ p["up"].T).detach(), host(x).detach()
    compiled = lorac.compile(host, {"side": adapter})
    assert_parity(compiled(x), y, base)
    emitted = lorac.compile(host, {"side": adapter}, target="onnxruntime", example_inputs=(x,))
    assert_parity(emitted(x), y, base, own_base=emitted(x, adapters=None))
    compiled(x).sum().backward()
    assert all(tensor.grad.any() for tensor in compiled.adapters["side"].parameters())
