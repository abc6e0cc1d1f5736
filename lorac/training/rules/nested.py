"""DyLoRA's rule: every step trains at one rank, drawn for all layers, so that components get an order.

Valipour et al. 2022, arXiv 2210.07558.
"""

import dataclasses
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lorac.argument_types import Operands
from lorac.errors import ChoiceError
from lorac.training.optimizer_state import GroupView, view_optimizer
from lorac.training.rule import Rule, State
from lorac.training.rules.pairs import copy_state
from lorac.variants.adaptive_rank import DyLoRA
from lorac.variants.base import Variant


@dataclass(frozen=True, eq=False)
class _Factor:
    """A tensor whose ``dim`` counts components."""

    tensor: Tensor
    dim: int

    @property
    def rank(self) -> int:
        return self.tensor.shape[self.dim]

    def component(self, index: int, of: Tensor) -> Tensor:
        """View one component of the tensor, or of a tensor of its shape; both axes stay."""
        return of.narrow(self.dim, index, 1)

    def share(self, index: int, value: Any) -> Any:
        """Copy one component's share of an entry of the tensor's optimizer state."""
        if not isinstance(value, Tensor):
            return value
        return (self.component(index, value) if value.shape == self.tensor.shape else value).clone()


class NestedRanks(Rule):
    """Every step runs at one rank b for all DyLoRA layers, drawn anew after it, and trains component b or all up to b.

    The rank holds for calls of the compiled model that train (in training mode, or with gradients recorded), whatever
    is active: the active DyLoRA adapters are cut to b. Other calls, such as an evaluation under ``torch.no_grad()`` in
    eval mode, have the whole rank, and so has a call with a choice of its own (``adapters=``). A layer of r < b
    components (``rank_pattern``) is used whole; then it has no component b, and under ``frozen`` it stands still.

    Components that do not move are skipped: their values and their optimizer state stay bit for bit, without weight
    decay, as if each component were a parameter of its own. Each keeps its own count of steps, too. This state is
    part of the optimizer's ``state_dict()`` as long as the rule is on, with the draws' state, so that a run resumes
    exactly. ``remove()`` hands it back to the optimizer, with the largest count as the tensor's.

    Args:
        compiled: as ``Rule``'s.
        optimizer: as ``Rule``'s.
        ranks: the values of b to draw from; default 1 to the largest r.
        weights: their probabilities, in any scale; default: equal ones.
        frozen: the paper's headline rule: components 1 to b − 1 are used, but only b trains.
        exact_skip: False as in the released code: components that do not move have a gradient of zero, so that
            momentum moves them still and weight decay acts.
        generator: draws the ranks; default: one of its own, begun from torch's seed. Processes that train together
            need generators of the same seed.

    Attributes:
        rank: b of the step to come.

    Raises:
        Unavailable, AdapterNotFound: as ``Rule``.
        ChoiceError: as ``Rule``; also ranks that no layer has, or weights that are not a distribution over them.
    """

    methods: ClassVar[tuple[type[Variant], ...]] = (DyLoRA,)
    governed: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")
    decides: ClassVar[frozenset[str]] = frozenset({"direction", "rate", "factors"})
    saved: ClassVar[str] = "nested_ranks"

    def __init__(
        self,
        compiled: nn.Module,
        optimizer: Optimizer,
        *,
        ranks: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        frozen: bool = True,
        exact_skip: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(compiled, optimizer)
        self.frozen, self.exact_skip = frozen, exact_skip
        self.before_gradients = exact_skip
        largest = max(len(term.tensors["lora_A"]) for term in self.terms)
        chosen = tuple(range(1, largest + 1)) if ranks is None else tuple(ranks)
        wrong = [b for b in chosen if not 1 <= b <= largest]
        if wrong or not chosen:
            raise ChoiceError(
                f"no layer has rank {wrong[0]}" if wrong else "ranks= is empty",
                nearest=f"1 to {largest}",
                next_step="give ranks= some of these, or None for all",
            )
        self.ranks = chosen
        likely = torch.ones(len(self.ranks)) if weights is None else torch.tensor(weights, dtype=torch.float64)
        total = float(likely.sum())
        if len(likely) != len(self.ranks) or bool((likely < 0).any()) or not 0 < total < math.inf:
            raise ChoiceError(
                f"weights={list(likely.tolist())} is not a distribution over {len(self.ranks)} ranks",
                next_step="give one number from 0 on for each, not all 0",
            )
        self.weights = likely
        self.generator = generator or torch.Generator().manual_seed(torch.initial_seed())
        self.rank = self._draw()
        self._cut = {term.adapter for term in self.terms}
        pairs = [(term.tensors[name], dim) for term in self.terms for dim, name in enumerate(self.governed)]
        self._factors = [_Factor(tensor, dim) for tensor, dim in pairs if tensor.requires_grad]
        known = self.optimizer.state
        self._states: list[list[State]] = [
            [{key: one.share(i, value) for key, value in known.get(one.tensor, {}).items()} for i in range(one.rank)]
            for one in self._factors
        ]
        self._stepping: list[tuple[int, int, nn.Parameter]] = []
        self._seen_states: dict[Tensor, State] = {}
        self.attach(*self._hooks())

    def view(self, optimizer: Optimizer) -> Optimizer:
        """Return a view that has the moving components in place of whole tensors."""
        self._stepping = []
        if not self.exact_skip:
            return optimizer
        indices = {id(factor.tensor): index for index, factor in enumerate(self._factors)}
        self._seen_states = defaultdict(dict, optimizer.state)
        groups = []
        for group in optimizer.param_groups:
            parts = (self._parts(indices[id(t)]) if id(t) in indices else (t,) for t in group["params"])
            groups.append(GroupView({**group, "params": list(itertools.chain.from_iterable(parts))}, group))
        return view_optimizer(optimizer, param_groups=groups, state=self._seen_states)

    def after(self) -> None:
        """Take the components and the states that the step made, and draw the next rank."""
        for index, component, part in self._stepping:
            factor = self._factors[index]
            factor.component(component, factor.tensor).copy_(part)
            self._states[index][component] = self._seen_states.pop(part)
        in_optimizer = {id(tensor) for group in self.optimizer.param_groups for tensor in group["params"]}
        self.optimizer.state.update({t: state for t, state in self._seen_states.items() if id(t) in in_optimizer})
        self.rank = self._draw()

    def remove(self) -> None:
        stepped = self._detach and self.exact_skip
        for factor, states in zip(self._factors, self._states, strict=True) if stepped else ():
            if any(states):
                self.optimizer.state[factor.tensor] = _join_states(factor, states)
        super().remove()

    def state(self) -> State:
        components = [[dict(state) for state in states] for states in self._states]
        return {"rank": self.rank, "draws": self.generator.get_state(), "components": components}

    def load_state(self, state: State) -> None:
        self.rank = state["rank"]
        self.generator.set_state(state["draws"].cpu())
        saved = zip(self._factors, state["components"], strict=True)
        self._states = [[copy_state(own, factor.tensor) for own in states] for factor, states in saved]

    def _draw(self) -> int:
        return self.ranks[int(torch.multinomial(self.weights.to(self.generator.device), 1, generator=self.generator))]

    def _moving(self, factor: _Factor) -> range:
        """Return the indices, from 0, of the components of a factor that move in this step."""
        return range(self.rank - 1 if self.frozen else 0, min(self.rank, factor.rank))

    def _parts(self, index: int) -> Iterator[nn.Parameter]:
        factor = self._factors[index]
        for component in self._moving(factor):
            part = nn.Parameter(factor.share(component, factor.tensor.detach()))
            part.grad = factor.share(component, factor.tensor.grad)
            self._seen_states[part] = self._states[index][component]
            self._stepping.append((index, component, part))
            yield part

    def _hooks(self) -> Iterator[RemovableHandle]:
        yield self.compiled.register_forward_pre_hook(self._choose, with_kwargs=True)
        for factor in self._factors if self.frozen else ():
            yield factor.tensor.register_hook(functools.partial(self._only_moving, factor))

    def _choose(self, module: nn.Module, args: Operands, kwargs: State) -> tuple[Operands, State] | None:
        if "adapters" in kwargs or not self.compiled.engine.computes_terms:
            return None
        active = {
            name: dataclasses.replace(how, rank=self.rank) if name in self._cut else how
            for name, how in self.compiled.choice
        }
        return args, {**kwargs, "adapters": active}

    def _only_moving(self, factor: _Factor, grad: Tensor) -> Tensor:
        """Return the gradient of the components that move, otherwise 0, so that clipping measures no other."""
        kept = torch.zeros_like(grad)
        for component in self._moving(factor):
            factor.component(component, kept).copy_(factor.component(component, grad))
        return kept


def _join_states(factor: _Factor, states: Sequence[State]) -> State:
    """One state of the whole tensor out of its components'; where a component has none yet it is 0."""
    shape = factor.component(0, factor.tensor).shape
    joined: State = {}
    for key in dict.fromkeys(key for state in states for key in state):
        found = [state[key] for state in states if state.get(key) is not None]
        if not found:
            joined[key] = None
        elif isinstance(found[0], Tensor) and found[0].shape == shape:
            filled = [state[key] if key in state else torch.zeros_like(found[0]) for state in states]
            joined[key] = torch.cat(filled, dim=factor.dim)
        else:
            joined[key] = max(found)
    return joined
