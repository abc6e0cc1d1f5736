"""Every rule and optimizer of lorac's with a method that it fits, on one small host: a plain loop, and its parts."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorac
from lorac import training
from lorac.training import AlternatingFactors
from tests.training.loops import trained
from tests.training.rules import drawn

TARGETS = ("first", "second")
FLYLORA = lorac.FlyLoRA(r=6, top_k=2, targets=TARGETS)
ROWS = 8


class Host(nn.Module):
    """Two layers of float64 that answer with a loss; the first may be recomputed in backward."""

    def __init__(self, *, checkpointing: bool | str = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(9, 8).double(), nn.Linear(8, 10).double()
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.checkpointing == "reentrant":
            hidden = checkpoint(self._hidden, x.detach().requires_grad_(), use_reentrant=True)
        else:
            hidden = checkpoint(self._hidden, x, use_reentrant=False) if self.checkpointing else self._hidden(x)
        return {"loss": (self.second(hidden) - labels).square().mean()}

    def _hidden(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()


@dataclass(frozen=True)
class Ruled:
    """One rule as it is used.

    Attributes:
        adapters: name -> method; all are active.
        optimizer: compiled -> optimizer.
        rule: (compiled, optimizer) -> the rule; None for an optimizer of lorac's own.
        unused: whether a step leaves tensors without gradients, as DDP has to know.
        alone: whether it is for one process only.
    """

    adapters: dict[str, Any]
    optimizer: Callable[[Any], Any]
    rule: Callable[[Any, Any], Any] | None
    unused: bool = False
    alone: bool = False

    def compiled(self, adapters: dict[str, Any] | None = None, **host: Any) -> Any:
        given = self.adapters if adapters is None else adapters
        compiled = lorac.compile(Host(**host), given, active=dict.fromkeys(given, 1.0), example_inputs=batch(0))
        if adapters is None:
            _away_from_init(compiled)
        return compiled.train()  # type: ignore[attr-defined]  # in eager it is a module

    def started(self, compiled: Any) -> Any:
        """The optimizer with the rule on."""
        optimizer = self.optimizer(compiled)
        if self.rule is not None:
            self.rule(compiled, optimizer)
        return optimizer


def _away_from_init(compiled: Any) -> None:
    """B away from 0, where it trains: some rules stand still at 0, and tests of them would say nothing."""
    for seed, (name, own) in enumerate((n, o) for n, a in compiled.adapters.items() for o in a.tensors.values()):
        if name == "a" and "lora_B" in own:
            own["lora_B"].data.copy_(0.3 * drawn(*own["lora_B"].shape, seed=70 + seed))


def sgd(compiled: Any) -> Any:
    return torch.optim.SGD(trained(compiled), lr=0.05, weight_decay=0.01)


def adamw(compiled: Any) -> Any:
    return torch.optim.AdamW(trained(compiled), lr=0.02)


def _galore(kind: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda compiled: kind(
        training.galore_groups(compiled, rank=2, update_proj_gap=2), lr=0.05, weight_decay=0.01, **options
    )


LORA = lorac.LoRA(r=4, alpha=8, targets=TARGETS)
RULES = {
    "nested_ranks": Ruled(
        {"a": lorac.DyLoRA(r=4, alpha=8, targets=TARGETS)},
        adamw,
        lambda c, o: training.NestedRanks(c, o, generator=torch.Generator().manual_seed(3)),
    ),
    "proximal_gates": Ruled(
        {"a": lorac.SoRA(r=4, alpha=8, targets=TARGETS)},
        adamw,
        lambda c, o: training.ProximalGates(c, o, threshold=0.01),
    ),
    "preconditioned": Ruled({"a": LORA}, sgd, lambda c, o: training.Preconditioned(c, o, reg=0.1)),
    "lora_pro": Ruled({"a": LORA}, adamw, training.LoRAPro),
    "lora_pro_full": Ruled({"a": LORA}, sgd, lambda c, o: training.LoRAPro(c, o, full=True)),
    "altlora": Ruled({"a": LORA}, sgd, training.AltLoRA),
    "altlora_plus_skipping": Ruled(
        {"a": LORA},
        sgd,
        lambda c, o: training.AltLoRA(c, o, plus=True, turns=AlternatingFactors("B", 2, skip_idle=True)),
        unused=True,
    ),
    "altlora_released": Ruled({"a": LORA}, sgd, lambda c, o: training.AltLoRA(c, o, plus=True, released=True)),
    "allora": Ruled({"a": lorac.LoRA(r=4, alpha=4, targets=TARGETS)}, sgd, training.ALLoRA),
    "lora_plus": Ruled({"a": LORA}, adamw, lambda c, o: training.LoRAPlus(c, o, ratio=4.0)),
    "relora": Ruled(
        {"a": LORA, "sum": lorac.LoRA(r=16, alpha=16, targets=TARGETS)},
        adamw,
        lambda c, o: training.ReLoRA(c, o, into="sum", every=2, prune=0.5),
        unused=True,
    ),
    "squeeze": Ruled(
        {"a": LORA}, adamw, lambda c, o: training.Squeeze(c, o, stages=((4, 2), (2, 3), (1, 9))), alone=True
    ),
    "balanced": Ruled({"a": FLYLORA}, adamw, lambda c, o: training.Balanced(c, o, rate=0.05)),
    "galore_adamw": Ruled({"a": lorac.Full(targets=TARGETS, bias="all")}, _galore(training.GaLoreAdamW), None),
    "galore_sgd": Ruled({"a": lorac.Full(targets=TARGETS)}, _galore(training.GaLoreSGD, momentum=0.9), None),
}


def batch(step: int, rows: slice = slice(None)) -> dict[str, Tensor]:
    """The rows of one step."""
    return {"x": drawn(ROWS, 9, seed=step)[rows], "labels": drawn(ROWS, 10, seed=100 + step)[rows]}


def train(model: Any, optimizer: Any, steps: Iterable[int], *, parts: int = 1) -> None:
    """A plain loop, each step in some micro-batches, with clipping that acts."""
    for step in steps:
        optimizer.zero_grad()
        for part in range(parts):
            rows = slice(part * ROWS // parts, (part + 1) * ROWS // parts)
            (model(**batch(step, rows))["loss"] / parts).backward()
        torch.nn.utils.clip_grad_norm_(trained(model), 0.5)
        optimizer.step()


def tensors_of(compiled: Any) -> list[Tensor]:
    """Every tensor that an adapter has, copied."""
    return [tensor.detach().clone() for adapter in compiled.adapters.values() for tensor in adapter.parameters()]


def copies(compiled: Any) -> dict[str, Any]:
    """The adapters with tensors of their own, as a file would give them back."""
    return {
        name: lorac.Adapter(
            name,
            adapter.variant,
            {path: {key: t.detach().clone() for key, t in own.items()} for path, own in adapter.tensors.items()},
            {key: t.detach().clone() for key, t in adapter.replaced.items()},
        )
        for name, adapter in compiled.adapters.items()
    }


def through_a_file(state: Any) -> Any:
    """A state dict as ``torch.load`` gives it, which unpickles nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
