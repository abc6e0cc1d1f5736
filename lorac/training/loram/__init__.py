"""LoRAM: train a LoRA on a smaller copy of a model, and run it on the whole one.

    smaller = loram.prune(model, heads=0.5, hidden=0.5)
    compiled = lorac.compile(smaller.model, {"mine": lorac.LoRA(r=8)})
    ...
    mine = loram.recover(compiled.adapters["mine"], smaller.kept, model)
    lorac.compile(model, {"mine": mine})

Zhang et al. 2025, arXiv 2502.13533.
"""

from lorac.training.loram.pruning import PrunedModel, SizeComparison, mask, prune
from lorac.training.loram.pruning_record import PruningRecord, read_pruning_record, write_pruning_record
from lorac.training.loram.recovery import align, recover
from lorac.training.loram.removed_units import read_removed_units, write_removed_units
from lorac.training.loram.units import UnitGroup, find_unit_groups

__all__ = [
    "PrunedModel",
    "PruningRecord",
    "SizeComparison",
    "UnitGroup",
    "align",
    "find_unit_groups",
    "mask",
    "prune",
    "read_pruning_record",
    "read_removed_units",
    "recover",
    "write_pruning_record",
    "write_removed_units",
]
