"""How an adapter begins: ``start(adapter, model, batches=None)`` gives it first values, of weights or of data.

    begun = PiSSA()(lorac.LoRA(r=8, targets="all-linear"), model)
    begun = LoRAGA()(lorac.LoRA(r=8), model, batches)
    compiled = lorac.compile(model, {"mine": begun})

A start that PEFT would rewrite the base for gives an adapter of ``lorac.Residual``, which holds what is taken out.
"""

from lorac.training.starts.from_activations import EVA, CorDA
from lorac.training.starts.from_gradients import LoRAGA, LoRAOne, LoRASB, first_rate
from lorac.training.starts.gradients import Gradients, summed_gradients
from lorac.training.starts.spectral import MiLoRA, OLoRA, PiSSA
from lorac.training.starts.start import Start

__all__ = [
    "EVA",
    "CorDA",
    "Gradients",
    "LoRAGA",
    "LoRAOne",
    "LoRASB",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "Start",
    "first_rate",
    "summed_gradients",
]
