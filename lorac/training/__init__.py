"""Training rules: what some methods do around an optimizer's step, attached to any torch optimizer by its own hooks.

optimizer = torch.optim.AdamW(p for p in compiled.parameters() if p.requires_grad)
with NestedRanks(compiled, optimizer):
    ...  # a plain loop, or Trainer(..., optimizers=(optimizer, None))
"""

from lorac.adapters.pruning import pruned
from lorac.adapters.squeezing import squeezed
from lorac.training.rules.allora import ALLoRA
from lorac.training.rules.altlora import AltLoRA, Turns
from lorac.training.rules.balanced import Balanced
from lorac.training.rules.galore import GaLoreAdamW, GaLoreSGD, galore_groups
from lorac.training.rules.lora_plus import LoRAPlus
from lorac.training.rules.lora_pro import LoRAPro
from lorac.training.rules.nested import NestedRanks
from lorac.training.rules.preconditioned import Preconditioned
from lorac.training.rules.proximal import ProximalGates, gate_penalty, soft_threshold, sora_code_threshold, thresholds
from lorac.training.rules.relora import ReLoRA
from lorac.training.rules.routing import by_row, draw_ordered, gate_loss, leave_one_out, tried_loss
from lorac.training.rules.squeeze import Squeeze, rank_stages
from lorac.variants._routing import ordered_log_prob

__all__ = [
    "ALLoRA",
    "AltLoRA",
    "Balanced",
    "GaLoreAdamW",
    "GaLoreSGD",
    "LoRAPlus",
    "LoRAPro",
    "NestedRanks",
    "Preconditioned",
    "ProximalGates",
    "ReLoRA",
    "Squeeze",
    "Turns",
    "by_row",
    "draw_ordered",
    "galore_groups",
    "gate_loss",
    "gate_penalty",
    "leave_one_out",
    "ordered_log_prob",
    "pruned",
    "rank_stages",
    "soft_threshold",
    "sora_code_threshold",
    "squeezed",
    "thresholds",
    "tried_loss",
]
