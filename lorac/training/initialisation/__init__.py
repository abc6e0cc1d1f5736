"""How an adapter begins: ``start(adapter, model, batches=None)`` gives it first values, of weights or of data.

    begun = PiSSA()(lorac.LoRA(r=8, targets="all-linear"), model)
    begun = LoRAGA()(lorac.LoRA(r=8), model, batches)
    compiled = lorac.compile(model, {"mine": begun})

A start that PEFT would rewrite the base for gives an adapter of ``lorac.Residual``, which holds what is taken out.
"""

from lorac.training.initialisation.from_activations import EVA, CorDA
from lorac.training.initialisation.from_gradients import LoRAGA, LoRAOne, LoRASB, first_rate
from lorac.training.initialisation.gradients import SummedGradients, sum_gradients
from lorac.training.initialisation.initialiser import Initialiser
from lorac.training.initialisation.spectral import MiLoRA, OLoRA, PiSSA

__all__ = [
    "EVA",
    "CorDA",
    "Initialiser",
    "LoRAGA",
    "LoRAOne",
    "LoRASB",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "SummedGradients",
    "first_rate",
    "sum_gradients",
]
