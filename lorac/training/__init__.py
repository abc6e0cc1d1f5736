"""Training rules: what some methods do around an optimizer's step, attached to any torch optimizer by its own hooks.

optimizer = torch.optim.AdamW(p for p in compiled.parameters() if p.requires_grad)
with NestedRanks(compiled, optimizer):
    ...  # a plain loop, or Trainer(..., optimizers=(optimizer, None))
"""

from lorac.adapters.pruning import pruned
from lorac.training.rules.allora import ALLoRA
from lorac.training.rules.altlora import AltLoRA, Turns
from lorac.training.rules.galore import GaLoreAdamW, GaLoreSGD, galore_groups
from lorac.training.rules.lora_plus import LoRAPlus
from lorac.training.rules.lora_pro import LoRAPro
from lorac.training.rules.nested import NestedRanks
from lorac.training.rules.preconditioned import Preconditioned
from lorac.training.rules.proximal import ProximalGates, gate_penalty, soft_threshold, sora_code_threshold, thresholds
from lorac.training.rules.relora import ReLoRA

__all__ = [
    "ALLoRA",
    "AltLoRA",
    "GaLoreAdamW",
    "GaLoreSGD",
    "LoRAPlus",
    "LoRAPro",
    "NestedRanks",
    "Preconditioned",
    "ProximalGates",
    "ReLoRA",
    "Turns",
    "galore_groups",
    "gate_penalty",
    "pruned",
    "soft_threshold",
    "sora_code_threshold",
    "thresholds",
]
