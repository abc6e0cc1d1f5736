"""LoRA+: B learns at a higher rate than A.

Hayou, Ghosh, Yu 2024, arXiv 2402.12354.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from lorac.ir.sites import SiteKind
from lorac.training.rule import Rule
from lorac.training.rules.pairs import ABOVE_0, FROM_0, check_settings
from lorac.variants.base import Variant
from lorac.variants.dora import DoRA
from lorac.variants.lora import LoRA

Tensor = torch.Tensor


class LoRAPlus(Rule):
    """B and its biases learn at ``ratio`` times the rate of their group, everything else at the group's rate.

    Outside a step the optimizer's groups are unchanged, so schedulers and state dicts do not see the second rate.

    Args:
        compiled: as ``Rule``'s.
        optimizer: as ``Rule``'s, of any kind whose groups have a rate ``lr``.
        ratio: λ = η_B/η_A; the paper recommends 16 (2⁴), and PEFT asks for it by name.
        embedding_lr: the rate of both factors at embeddings, whose roles are reversed; None: their group's.

    Raises:
        Unavailable, AdapterNotFound: as ``Rule``.
        ChoiceError: as ``Rule``; ratio is not above 0, or a rate is below 0.
    """

    methods: ClassVar[tuple[type[Variant], ...]] = (LoRA, DoRA)
    governed: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def __init__(
        self, compiled: Any, optimizer: Any, *, ratio: float = 16.0, embedding_lr: float | None = None
    ) -> None:
        super().__init__(compiled, optimizer)
        name = type(self).__name__
        check_settings(name, ratio=(ratio, ABOVE_0))
        if embedding_lr is not None:
            check_settings(name, embedding_lr=(embedding_lr, FROM_0))
        self.ratio, self.embedding_lr = ratio, embedding_lr
        self._whole: list[dict[str, Any]] = []
        self._faster: set[int] = set()
        self._embedded: set[int] = set()
        for term in self.terms:
            embedding = self.compiled.sites[term.site].kind is SiteKind.EMBEDDING
            faster = () if embedding else ("lora_B", "lora_bias")
            self._faster |= {id(tensor) for key, tensor in term.tensors.items() if key in faster}
            self._embedded |= {id(tensor) for tensor in term.tensors.values() if embedding}
        self.attach()

    def before(self) -> None:
        """Split every group by its tensors' rates."""
        self._put_back()  # where the step before this one raised
        self._whole = list(self.optimizer.param_groups)
        parted = []
        for group in self._whole:
            rates: dict[Any, list[Tensor]] = {}
            for tensor in group["params"]:
                rates.setdefault(self._rate(tensor, group["lr"]), []).append(tensor)
            parted += [{**group, "params": tensors, "lr": rate} for rate, tensors in rates.items()]
        self.optimizer.param_groups[:] = parted

    def after(self) -> None:
        """Restore the groups."""
        self._put_back()

    def remove(self) -> None:
        super().remove()
        self._put_back()

    def _rate(self, tensor: Tensor, rate: Any) -> Any:
        if id(tensor) in self._embedded and self.embedding_lr is not None:
            return self.embedding_lr
        return rate * self.ratio if id(tensor) in self._faster else rate

    def _put_back(self) -> None:
        if self._whole:
            self.optimizer.param_groups[:] = self._whole
            self._whole = []
