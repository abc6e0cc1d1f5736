"""LoRA+: B learns at a higher rate than A.

Hayou, Ghosh, Yu 2024, arXiv 2402.12354.
"""

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lorac.errors import ChoiceError
from lorac.ir.sites.site import SiteKind
from lorac.training.optimizer_state import Group, GroupView, view_optimizer
from lorac.training.rule import Rule, State
from lorac.training.rules.pairs import ABOVE_0, FROM_0, check_settings
from lorac.variants.base import Variant
from lorac.variants.dora import DoRA
from lorac.variants.lora import LoRA

_PLAIN, _FASTER, _EMBEDDED = "plain", "faster", "embedded"


class LoRAPlus(Rule):
    """B and its biases learn at ``ratio`` times the rate of their group, everything else at the group's rate.

    The optimizer's groups keep their tensors and rates, so schedulers and state dicts do not see the second rate. An
    optimizer that writes into its groups at a step, such as a schedule-free one, does so for each rate; the rule's
    state holds the entries of all rates but the group's own.

    Args:
        compiled: as ``Rule``'s.
        optimizer: as ``Rule``'s, of any kind whose groups have a rate ``lr``.
        ratio: λ = η_B/η_A; the paper recommends 16 (2⁴), and PEFT has no default.
        embedding_lr: the rate of both factors at embeddings, whose roles are reversed; None: their group's.

    Raises:
        Unavailable, AdapterNotFound: as ``Rule``.
        ChoiceError: as ``Rule``; ratio is not above 0, a rate is below 0, or a group has no rate.
    """

    methods: ClassVar[tuple[type[Variant], ...]] = (LoRA, DoRA)
    governed: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    decides: ClassVar[frozenset[str]] = frozenset({"rate"})
    saved: ClassVar[str] = "lora_plus"

    def __init__(
        self, compiled: nn.Module, optimizer: Optimizer, *, ratio: float = 16.0, embedding_lr: float | None = None
    ) -> None:
        super().__init__(compiled, optimizer)
        name = type(self).__name__
        check_settings(name, ratio=(ratio, ABOVE_0), embedding_lr=(embedding_lr or 0.0, FROM_0))
        if any(group.get("lr") is None for group in self.optimizer.param_groups):
            raise ChoiceError(
                f"{name} multiplies the rate of a group, and {type(self.optimizer).__name__} has one without",
                next_step="give lr= to the optimizer, and no relative step to transformers' Adafactor",
            )
        self.ratio, self.embedding_lr = ratio, embedding_lr
        self._roles: dict[int, str] = {}
        self._written: dict[str, Group] = {}
        for term in self.terms:
            embedding = self.compiled.sites[term.site].kind is SiteKind.EMBEDDING
            if embedding and embedding_lr is not None:
                self._roles |= {id(tensor): _EMBEDDED for tensor in term.tensors.values()}
            elif not embedding:
                faster = [term.tensors[name] for name in ("lora_B", "lora_bias") if name in term.tensors]
                self._roles |= {id(tensor): _FASTER for tensor in faster}
        self.attach()

    def view(self, optimizer: Optimizer) -> Optimizer:
        """Split every group by its tensors' rates."""
        parts = [part for index, group in enumerate(optimizer.param_groups) for part in self._split(index, group)]
        return view_optimizer(optimizer, param_groups=parts)

    def state(self) -> State:
        return {"written": {key: dict(entries) for key, entries in self._written.items()}}

    def load_state(self, state: State) -> None:
        self._written = {key: dict(entries) for key, entries in state["written"].items()}

    def _split(self, index: int, group: Group) -> Iterator[Group]:
        """Yield the parts of a group by the role of their tensors, each with its rate and its own written entries."""
        tensors: dict[str, list[Tensor]] = {}
        for tensor in group["params"]:
            tensors.setdefault(self._roles.get(id(tensor), _PLAIN), []).append(tensor)
        rates = {_PLAIN: group["lr"], _FASTER: group["lr"] * self.ratio, _EMBEDDED: self.embedding_lr}
        for role, own in tensors.items():
            store = group if role == _PLAIN else self._written.setdefault(f"{index} {role}", {})
            yield GroupView({**group, **store, "params": own, "lr": rates[role]}, store)
