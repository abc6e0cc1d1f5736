"""LoRAM: train a LoRA on a smaller copy of a model, and run it on the whole one.

    smaller = loram.prune(model, heads=0.5, hidden=0.5)
    compiled = lorac.compile(smaller.model, {"mine": lorac.LoRA(r=8)})
    ...
    mine = loram.recover(compiled.adapters["mine"], smaller.kept, model)
    lorac.compile(model, {"mine": mine})

Zhang et al. 2025, arXiv 2502.13533.
"""

from lorac.training.loram.kept import Kept, read_kept, write_kept
from lorac.training.loram.recovery import align, recover
from lorac.training.loram.smaller import Sizes, Smaller, mask, prune
from lorac.training.loram.units import Group, groups_of

__all__ = [
    "Group",
    "Kept",
    "Sizes",
    "Smaller",
    "align",
    "groups_of",
    "mask",
    "prune",
    "read_kept",
    "recover",
    "write_kept",
]
