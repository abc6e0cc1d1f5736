"""In-Squeeze: training begins at a high rank and is refactored to lower ones on the way.

Vulić et al. 2026, arXiv 2602.10993.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from lorac.adapters.rank_reduction import reduce_rank
from lorac.errors import ChoiceError, Unavailable
from lorac.training.rule import Rule, State, spans_processes, trained_terms
from lorac.variants.base import Variant
from lorac.variants.lora import LoRA

Stages = Sequence[tuple[int, int]]
"""(rank, steps) of every stage."""


def rank_stages(first: int, last: int, steps: int) -> tuple[tuple[int, int], ...]:
    """(rank, steps) of every stage: ranks halve from ``first`` to ``last``, and the steps are shared out evenly.

    Args:
        first: r of the source.
        last: r of the result.
        steps: of all stages together; a remainder goes to the last ones. The paper has 200 or more in each.

    Raises:
        ChoiceError: the ranks do not fall, or there are fewer steps than stages.
    """
    if not 0 < last <= first:
        raise ChoiceError(
            f"no ranks fall from {first} to {last}", next_step="first= is the larger of two whole numbers"
        )
    ranks = [first]
    while ranks[-1] > last:
        ranks.append(max(ranks[-1] // 2, last))
    if steps < len(ranks):
        raise ChoiceError(f"{steps} steps are too few for the ranks {ranks}", next_step="give each at least one")
    ends = [steps * i // len(ranks) for i in range(len(ranks) + 1)]
    return tuple((rank, end - start) for rank, (start, end) in zip(ranks, pairwise(ends), strict=True))


class Squeeze(Rule):
    """At the end of each stage but the last, the LoRAs are reduced to the next stage's rank while training goes on.

    The compiled model and the optimizer continue with new, smaller tensors: the scale, the active choice and the
    optimizer's groups stay; moments of the reduced factors start at 0. Other references to the tensors must be renewed
    from ``compiled.adapters``; another rule on the same optimizer refuses the next step and must be attached again.

    To resume, compile from the saved adapter (``lorac.load_adapter``), which has the rank of its stage.

    Args:
        compiled: as ``Rule``'s.
        optimizer: as ``Rule``'s, of any kind.
        stages: as of ``rank_stages``; ranks fall.

    Raises:
        Unavailable, AdapterNotFound: as ``Rule``; several processes train together, whose wrapper holds the tensors:
            use ``reduce_rank`` between trainings there.
        ChoiceError: as ``Rule``; the ranks do not fall, or a stage has no step.
    """

    methods: ClassVar[tuple[type[Variant], ...]] = (LoRA,)
    in_residuals: ClassVar[bool] = False
    governed: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    decides: ClassVar[frozenset[str]] = frozenset({"direction", "rate", "factors"})
    saved: ClassVar[str] = "squeeze"

    def __init__(self, compiled: nn.Module, optimizer: Optimizer, *, stages: Stages) -> None:
        super().__init__(compiled, optimizer)
        ranks, steps = [rank for rank, _ in stages], [count for _, count in stages]
        falling = all(a > b for a, b in pairwise(ranks))
        if not stages or not falling or min(steps) < 1 or min(ranks) < 1:
            raise ChoiceError(
                f"stages={list(stages)} are not (rank, steps) of falling ranks",
                next_step="the ranks halve in those of rank_stages",
            )
        if spans_processes():
            raise Unavailable(
                "Squeeze exchanges tensors that several processes' wrapper holds",
                next_step="train a stage, compile again with the adapter that `reduce_rank` returns, and wrap that",
            )
        self.stages, self.steps = tuple(stages), 0
        self.attach()

    def after(self) -> None:
        """Count the step, and reduce the rank if its stage is over."""
        self.steps += 1
        end = 0
        for (_, count), (rank, _) in pairwise(self.stages):
            end += count
            if self.steps == end:
                self._squeeze(rank)

    def state(self) -> State:
        return {"steps": self.steps}

    def load_state(self, state: State) -> None:
        self.steps = state["steps"]

    def _squeeze(self, rank: int) -> None:
        names = dict.fromkeys(term.adapter for term in self.terms)
        made = {name: reduce_rank(self.compiled.adapters[name], rank, seed=self.steps) for name in names}
        active, old = dict(self.compiled.choice), {id(t): t for term in self.terms for t in term.tensors.values()}
        places = {id(t): (term.adapter, term.site, key) for term in self.terms for key, t in term.tensors.items()}
        for name, adapter in made.items():
            self.compiled.remove_adapter(name)
            self.compiled.add_adapter(adapter, name)
        self.compiled.swap(active)
        self.terms = trained_terms(self.compiled, self.methods, in_residuals=self.in_residuals)
        new = {(term.adapter, term.site, key): t for term in self.terms for key, t in term.tensors.items()}
        for index, tensor in old.items():
            new[places[index]].requires_grad_(tensor.requires_grad)
            self.optimizer.state.pop(tensor, None)
        for group in self.optimizer.param_groups:
            group["params"] = [new[places[id(t)]] if id(t) in places else t for t in group["params"]]
