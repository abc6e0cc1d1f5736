"""Training rules: the work of some methods before and after a step, as hooks of any torch optimizer.

optimizer = torch.optim.AdamW(p for p in compiled.parameters() if p.requires_grad)
with NestedRanks(compiled, optimizer):
    ...  # a plain loop, or Trainer(..., optimizers=(optimizer, None))
"""

from lorac.adapters.rank_reduction import prune_gates, reduce_rank
from lorac.training.optimizer_state import name_optimizer_state
from lorac.training.rules.allora import ALLoRA
from lorac.training.rules.altlora import AlternatingFactors, AltLoRA
from lorac.training.rules.balanced import Balanced
from lorac.training.rules.galore import GaLoreAdamW, GaLoreSGD, galore_groups
from lorac.training.rules.lora_plus import LoRAPlus
from lorac.training.rules.lora_pro import LoRAPro
from lorac.training.rules.nested import NestedRanks
from lorac.training.rules.preconditioned import Preconditioned
from lorac.training.rules.proximal import ProximalGates, gate_penalty, soft_threshold, sora_code_threshold, thresholds
from lorac.training.rules.relora import ReLoRA, restart_schedule
from lorac.training.rules.routing import draw_ordered, gate_loss, leave_one_out, sampled_selection_loss, sum_by_row
from lorac.training.rules.squeeze import Squeeze, rank_stages
from lorac.training.shards import gather_base, shard_base
from lorac.variants._mixtures import ordered_log_prob

__all__ = [
    "ALLoRA",
    "AltLoRA",
    "AlternatingFactors",
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
    "draw_ordered",
    "galore_groups",
    "gate_loss",
    "gate_penalty",
    "gather_base",
    "leave_one_out",
    "name_optimizer_state",
    "ordered_log_prob",
    "prune_gates",
    "rank_stages",
    "reduce_rank",
    "restart_schedule",
    "sampled_selection_loss",
    "shard_base",
    "soft_threshold",
    "sora_code_threshold",
    "sum_by_row",
    "thresholds",
]
