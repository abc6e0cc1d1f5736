"""The models of the hosts that every method is tested on (``lorac.testing.hosts``)."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TransposedLinear(nn.Module):
    """GPT-2's linear layer, with a weight stored as (in, out); lorac recognises its name and fields."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


TransposedLinear.__name__ = "Conv1D"  # transformers' name, by which the class is recognised


class Block(nn.Module):
    """``h + U·tanh(D·h)``: a residual block, not linear in its input."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(torch.tanh(self.down(h)))


def chain_layers(**layers: nn.Module) -> nn.Sequential:
    """Return a model that runs layers one after another, each at the path of its name."""
    return nn.Sequential(OrderedDict(layers))


class SelfAttentionModel(nn.Module):
    """Self-attention whose output layer at path ``site.out_proj`` is not called: torch's module reads its weight."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.site = nn.MultiheadAttention(width, heads, batch_first=True)
        with torch.no_grad():
            self.site.in_proj_bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        return self.site(x, x, x, need_weights=False)[0]


class TwoTables(nn.Module):
    """A model with two embeddings of the same ids; ids wrap around in the second, smaller table."""

    def __init__(self, first: nn.Embedding, second: nn.Embedding) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([self.first(ids), self.second(ids % self.second.num_embeddings)], dim=-1)


class TwoBlocks(nn.Module):
    """A model with two blocks of unequal width, and a layer between them that no adapter targets."""

    def __init__(self, first: Block, second: Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([first, second])
        self.between = nn.Linear(first.down.in_features, second.down.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](self.between(self.blocks[0](x)))


class GatedMLP(nn.Module):
    """``D·(silu(G·x) ∘ U·x)``: the MLP of most language models."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TwoMLPs(nn.Module):
    """A model with two gated MLPs of unequal width in residual position, and a layer between them."""

    def __init__(self, first: GatedMLP, second: GatedMLP) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.between = nn.Linear(first.gate.in_features, second.gate.in_features)

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(x + self.first(x))
        return h + self.second(h)


class LayerStack(nn.Module):
    """A model of blocks, at ``blocks``, followed by a norm at ``norm``."""

    def __init__(self, width: int, *hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, size) for size in hidden])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
