"""Initialisers: ``initialiser(adapter, model, batches=None)`` computes an adapter's first values from weights or data.

    adapter = PiSSA()(lorac.LoRA(r=8, targets="all-linear"), model)
    adapter = LoRAGA()(lorac.LoRA(r=8), model, batches)
    compiled = lorac.compile(model, {"mine": adapter})

Where PEFT would rewrite the base, the adapter is a ``lorac.Residual``, which holds the part to subtract from it.
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
