"""A tiny model in float64, LoRAs on it, and the changes of its weights by adapters."""

import torch
from torch import nn

import lorac
from lorac import Adapter
from lorac.ir.algebra.changes import Change, merge_weight

LAYERS = {"conv": (18, 54), "fc1": (36, 48), "fc2": (24, 36)}
"""Site -> (out, in); the order is that of the names too."""


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 18, 3, padding=1)
        self.fc1 = nn.Linear(48, 36)
        self.fc2 = nn.Linear(36, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.tanh(self.fc1(self.conv(x).flatten(1)[:, :48])))


def host() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Host().double().eval().requires_grad_(False)


def lora(name: str, seed: int, sites=("fc1", "fc2"), **fields) -> Adapter:
    """A LoRA with every tensor drawn, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    variant = lorac.LoRA(targets=tuple(sites), **fields)
    tensors = {}
    for path in sites:
        (out, columns), rank = LAYERS[path], variant.at_path(path).r
        tensors[path] = {"lora_A": draw(rank, columns), "lora_B": draw(out, rank)}
        if variant.lora_bias:
            tensors[path]["lora_bias"] = draw(out)
    return Adapter(name, variant, tensors)


@torch.no_grad()
def deltas(adapter: Adapter, model: nn.Module) -> dict[str, torch.Tensor]:
    """What an adapter adds to the weight of each site (out, in)."""
    return {path: delta(change, weight_at(model, path)) for path, change in lorac.factors(adapter, model).items()}


def delta(change: Change, weight: torch.Tensor) -> torch.Tensor:
    return merge_weight(change, weight) - weight


def weight_at(model: nn.Module, path: str) -> torch.Tensor:
    """The weight of a site as a matrix (out, in), or a parameter of that name."""
    names = dict(model.named_parameters())
    return (names[f"{path}.weight"] if f"{path}.weight" in names else names[path]).flatten(1)
