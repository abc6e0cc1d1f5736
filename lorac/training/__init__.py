"""Training rules: what some methods do around an optimizer's step, attached to any torch optimizer by its own hooks.

optimizer = torch.optim.AdamW(p for p in compiled.parameters() if p.requires_grad)
with NestedRanks(compiled, optimizer):
    ...  # a plain loop, or Trainer(..., optimizers=(optimizer, None))
"""

from lorac.adapters.pruning import pruned
from lorac.training.nested import NestedRanks
from lorac.training.preconditioned import Preconditioned
from lorac.training.proximal import ProximalGates, gate_penalty, soft_threshold, sora_code_threshold, thresholds

__all__ = [
    "NestedRanks",
    "Preconditioned",
    "ProximalGates",
    "gate_penalty",
    "pruned",
    "soft_threshold",
    "sora_code_threshold",
    "thresholds",
]
