"""FlyLoRA's balancing: a bias that no loss sees makes experts that are chosen too often rarer.

Zou et al., NeurIPS 2025, arXiv 2510.08396, for any method that chooses by a score plus a bias.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorac.errors import AdapterNotFound
from lorac.training.rule import Rule, list_adapters, spans_processes, unwrap_ddp
from lorac.training.rules.pairs import FROM_0, check_settings
from lorac.variants.base import BranchVariant, Variant

_CHOSEN = "chosen"
"""The extra output with the choices: (…, n), not 0 where a token chose."""


class Balanced(Rule):
    """After every step d_i ← d_i + u·sign(mean(c) − c_i), c_i the number of tokens that chose i in all of the step.

    Micro-batches and the processes that train together are one step; a call that a checkpoint computes again counts
    once, and one that does not train not at all. The bias d is a buffer of the adapter: saved with it, constant when
    deployed.

    Args:
        compiled: as ``Rule``'s.
        optimizer: as ``Rule``'s; its steps are those of the rule.
        rate: u; the paper's 1e-3.
        bias: name of the buffer d (n,).

    Raises:
        Unavailable: as ``Rule``.
        AdapterNotFound: no adapter's method emits "chosen", (…, n), not 0 where a token chose, and holds such a buffer.
        ChoiceError: u is below 0 or not finite.
    """

    methods: ClassVar[tuple[type[Variant], ...]] = (BranchVariant,)
    governed: ClassVar[tuple[str, ...]] = ()
    listens: ClassVar[tuple[str, ...]] = (_CHOSEN,)

    def __init__(
        self, compiled: nn.Module, optimizer: Optimizer, *, rate: float = 1e-3, bias: str = "lora_topk_bias"
    ) -> None:
        adapters = getattr(unwrap_ddp(compiled), "adapters", {}).values()
        found = {
            type(adapter.variant): None
            for adapter in adapters
            if _CHOSEN in getattr(adapter.variant, "emits", ()) and any(bias in own for own in adapter.tensors.values())
        }
        if not found:
            raise AdapterNotFound(
                f"no adapter emits '{_CHOSEN}' and holds a buffer '{bias}'; there is {list_adapters(adapters)}",
                next_step="compile with a method that chooses by a score and a bias",
            )
        self.methods = tuple(found)  # type: ignore[misc]  # which they are is known of this model alone
        super().__init__(compiled, optimizer)
        check_settings(type(self).__name__, rate=(rate, FROM_0))
        self.rate = rate
        self._biases = {term.site: term.tensors[bias] for term in self.terms}
        self._counts: dict[str, Tensor] = {}
        self.attach()

    def hear(self, emitted: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Count the choices of one call."""
        for path, chosen in emitted[_CHOSEN].items():
            count = (chosen != 0).flatten(0, -2).sum(0)
            self._counts[path] = self._counts[path] + count if path in self._counts else count

    def after(self) -> None:
        """Move the biases by the counts, and begin to count anew."""
        for path, count in self._counts.items():
            if spans_processes():
                torch.distributed.all_reduce(count)
            whole, bias = count.to(torch.float64), self._biases[path]
            bias.add_((self.rate * torch.sign(whole.mean() - whole)).to(bias))
        self._counts = {}
