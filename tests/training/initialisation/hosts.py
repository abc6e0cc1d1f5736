"""Every start, on a small host that answers with a loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from lorac.training import initialisation as starts
from lorac.training.initialisation import Initialiser

RANK, ALPHA = 2, 3.0
LORA = lorac.LoRA(r=RANK, alpha=ALPHA, targets=("up", "down"))
XS = lorac.LoRAXS(r=RANK, alpha=ALPHA, targets=("up", "down"))
AT_BASE: dict[str, Initialiser] = {
    "pissa": starts.PiSSA(),
    "pissa_rounds": starts.PiSSA(rounds=4),
    "milora": starts.MiLoRA(),
    "olora": starts.OLoRA(),
    "corda_ipm": starts.CorDA(),
    "corda_kpm": starts.CorDA(mode="kpm"),
    "eva": starts.EVA(),
    "lora_ga": starts.LoRAGA(),
    "lora_ga_peft": starts.LoRAGA(peft=True, direction="A2rBr"),
    "lora_one_residual": starts.LoRAOne(residual=True),
}
"""Those that begin at the base's output."""
OFF_BASE: dict[str, Initialiser] = {
    "lora_one": starts.LoRAOne(),
    "lora_sb": starts.LoRASB(lr=0.02, warmup=0.5, steps=4),
}
"""Those that begin a step away from it."""
STARTS = AT_BASE | OFF_BASE


class Net(nn.Module):
    """Two layers with dropout and a norm that counts, and one, ``never``, that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.drop = nn.Dropout(0.2)
        self.norm = nn.BatchNorm1d(9)
        self.down = nn.Linear(9, 5, bias=False)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.down(torch.tanh(self.norm(self.drop(self.up(x)))))
        return logits if labels is None else SimpleNamespace(loss=F.cross_entropy(logits, labels))


def net(dtype: torch.dtype = torch.float64) -> Net:
    """A fresh host, the same each time, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval().to(dtype)


def batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """What the host is called with."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(7, 6, generator=generator, dtype=torch.float64).to(dtype),
            "labels": torch.randint(5, (7,), generator=generator),
        }
        for _ in range(count)
    ]


def begun(name: str, model: nn.Module, dtype: torch.dtype = torch.float64) -> lorac.Adapter:
    """An adapter at what a start gives it."""
    return STARTS[name](XS if name == "lora_sb" else LORA, model, batches(dtype=dtype))
