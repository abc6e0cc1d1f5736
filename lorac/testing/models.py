"""The models of the hosts that every method is tested on (``lorac.testing.hosts``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

Tensor = torch.Tensor


class Conv1D(nn.Module):
    """GPT-2's linear layer, which stores its weight as (in, out); known to lorac by this name and these fields."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        """y (…, nf) from x (…, nx)."""
        return x @ self.weight + self.bias


class Block(nn.Module):
    """``h + U·tanh(D·h)``: a residual block, not linear in its input."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, h: Tensor) -> Tensor:
        """h' (…, width) from h (…, width)."""
        return h + self.up(torch.tanh(self.down(h)))


class OneSite(nn.Module):
    """A model that is one layer, at path ``site``."""

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        """What the site answers."""
        return self.site(x)


class SelfAttentionModel(nn.Module):
    """Self-attention, whose output layer at path ``site.out_proj`` is never called: torch's module reads its weight."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.site = nn.MultiheadAttention(width, heads, batch_first=True)
        with torch.no_grad():
            self.site.in_proj_bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        """y (…, length, width) from x (…, length, width)."""
        return self.site(x, x, x, need_weights=False)[0]


class OneBlock(nn.Module):
    """A model that is one block of a list, at path ``blocks.0``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])

    def forward(self, x: Tensor) -> Tensor:
        """What the block answers."""
        return self.blocks[0](x)


class TwoLayers(nn.Module):
    """A model that is two layers of a kind, at ``first`` and ``second``."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """What the second answers to the first."""
        return self.second(torch.tanh(self.first(x)))


class TwoTables(nn.Module):
    """A model that is two embeddings beside each other."""

    def __init__(self, first: nn.Embedding, second: nn.Embedding) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of both; the second table's, which is smaller, are used again."""
        return torch.cat([self.first(ids), self.second(ids % self.second.num_embeddings)], dim=-1)


class TwoBlocks(nn.Module):
    """A model that is two blocks of unequal width, with a layer between them that no adapter is for."""

    def __init__(self, first: Block, second: Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([first, second])
        self.between = nn.Linear(first.down.in_features, second.down.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """What the second answers to the first."""
        return self.blocks[1](self.between(self.blocks[0](x)))


class GatedMLP(nn.Module):
    """``D·(silu(G·x) ∘ U·x)``: an MLP as most language models have it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """y (…, width) from x (…, width)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LayerWithFront(nn.Module):
    """A model that is a layer, at ``site``, behind another, at ``front``."""

    def __init__(self, front: nn.Module, site: nn.Module) -> None:
        super().__init__()
        self.front, self.site = front, site

    def forward(self, x: Tensor) -> Tensor:
        """What the site answers to the layer before it."""
        return self.site(torch.tanh(self.front(x)))


class TwoMLPs(nn.Module):
    """A model that is two gated MLPs of unequal width, each beside what it reads, with a layer between them."""

    def __init__(self, first: GatedMLP, second: GatedMLP) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.between = nn.Linear(first.gate.in_features, second.gate.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """What the second answers to the first."""
        h = self.between(x + self.first(x))
        return h + self.second(h)


class LayerStack(nn.Module):
    """A model of blocks, at ``blocks``, with a norm behind them, at ``norm``."""

    def __init__(self, width: int, *hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, size) for size in hidden])
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """y (…, length, width) from x (…, length, width)."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
