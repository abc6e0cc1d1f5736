"""In-Squeeze: training begins at a high rank, and the LoRAs are refactored to lower ranks during it.

Vulić et al. 2026, arXiv 2602.10993.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lorac.adapters.rank_reduction import reduce_rank
from lorac.errors import ChoiceError, Unavailable
from lorac.training.rule import Rule, State, spans_processes, trained_terms
from lorac.variants.base import Variant
from lorac.variants.lora import LoRA

Stages = Sequence[tuple[int, int]]
"""(rank, number of steps) of each stage, in order."""


def rank_stages(first: int, last: int, steps: int) -> tuple[tuple[int, int], ...]:
    """Return stages whose ranks halve from ``first`` to ``last``, and whose numbers of steps differ by at most one.

    Args:
        first: rank of the first stage.
        last: rank of the last stage.
        steps: number of steps of all stages together. The paper has 200 or more in each stage.

    Raises:
        ChoiceError: ``first`` is below ``last``, ``last`` is not positive, or there are fewer steps than stages.
    """
    if not 0 < last <= first:
        raise ChoiceError(
            f"ranks cannot fall from {first} to {last}", next_step="give two whole numbers, the larger as first="
        )
    ranks = [first]
    while ranks[-1] > last:
        ranks.append(max(ranks[-1] // 2, last))
    if steps < len(ranks):
        raise ChoiceError(f"{steps} steps are too few for the ranks {ranks}", next_step="give each at least one")
    bounds = [steps * i // len(ranks) for i in range(len(ranks) + 1)]
    return tuple((rank, end - start) for rank, (start, end) in zip(ranks, pairwise(bounds), strict=True))


class Squeeze(Rule):
    """A rule that reduces the LoRAs to the next stage's rank when a stage ends, while training goes on.

    The compiled model and the optimizer continue with new, smaller tensors. The scale, the active choice and the
    optimizer's groups stay; the moments of the reduced factors start at 0. Code that holds the old tensors must read
    the new ones from ``compiled.adapters``. Another rule on the same optimizer refuses the next step, and must be
    attached again.

    To resume, compile with the saved adapter (``lorac.load_adapter``), which has the rank of its stage.

    Args:
        compiled: the same as for ``Rule``.
        optimizer: the same as for ``Rule``; any kind of optimizer.
        stages: (rank, number of steps) of each stage, such as ``rank_stages`` returns; each rank is below the last.

    Raises:
        Unavailable, AdapterNotFound: for the reasons of ``Rule``. Also Unavailable if several processes train together,
            whose wrapper (DDP) holds the tensors: use ``reduce_rank`` between trainings there.
        ChoiceError: for the reasons of ``Rule``; or the ranks do not fall, or a stage has no step.
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
                f"stages={list(stages)} are not pairs (rank, steps) with falling ranks",
                next_step="rank_stages makes such pairs",
            )
        if spans_processes():
            raise Unavailable(
                "Squeeze replaces tensors, and the wrapper for several processes keeps the old ones",
                next_step="train a stage, compile again with the adapter that `reduce_rank` returns, and wrap that",
            )
        self.stages = tuple(stages)
        self.steps = 0
        self.attach()

    def after(self) -> None:
        """Count the step, and reduce the LoRAs to the next stage's rank if a stage ends with it."""
        self.steps += 1
        ends = accumulate(steps for _, steps in self.stages)
        next_rank = dict(zip(ends, [rank for rank, _ in self.stages[1:]], strict=False)).get(self.steps)
        if next_rank is None:
            return
        old_tensors = self._list_tensors()
        active = dict(self.compiled.choice)
        # Each reduction has another seed; a resumed run, which restores the count of steps, has the same seeds.
        reduced = {
            name: reduce_rank(self.compiled.adapters[name], next_rank, seed=self.steps)
            for name in dict.fromkeys(term.adapter for term in self.terms)
        }
        for name, adapter in reduced.items():
            self.compiled.remove_adapter(name)
            self.compiled.add_adapter(adapter, name)
        self.compiled.swap(active)
        self.terms = trained_terms(self.compiled, self.methods, in_residuals=self.in_residuals)
        new_tensors = self._list_tensors()
        replacements: dict[Tensor, Tensor] = {}  # a tensor is hashed by its identity
        for key, old in old_tensors.items():
            replacements[old] = new_tensors[key].requires_grad_(old.requires_grad)
            self.optimizer.state.pop(old, None)
        for group in self.optimizer.param_groups:
            group["params"] = [replacements.get(tensor, tensor) for tensor in group["params"]]

    def state(self) -> State:
        return {"steps": self.steps}

    def load_state(self, state: State) -> None:
        self.steps = state["steps"]

    def _list_tensors(self) -> dict[tuple[str, str, str], Tensor]:
        """Return the tensors of the terms by adapter, path of the site, and parameter name."""
        return {(term.adapter, term.site, name): t for term in self.terms for name, t in term.tensors.items()}
