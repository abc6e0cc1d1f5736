"""AltLoRA and AltLoRA+: one factor moves at a time, along its projected gradient, with momentum that follows.

Yu et al., NeurIPS 2025, arXiv 2505.12455; ``released`` is the authors' optimizers, which differ from the paper.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorac.errors import not_one_of
from lorac.training.optimizer_state import Group
from lorac.training.rule import State
from lorac.training.rules.pairs import (
    BELOW_1,
    FROM_0,
    FROM_1,
    Gram,
    Pair,
    PairRule,
    check_plain_sgd,
    check_saved_state,
    check_settings,
    copy_state,
)

_EPS = 1e-6
"""ε, the released code's."""


@dataclass(frozen=True)
class AlternatingFactors:
    """The turns of the factors: one of every pair moves at a time.

    Attributes:
        first: who begins: ``"A"`` as in the paper's listing, or ``"B"``, which scored better there: while B is 0 a turn
            of A moves nothing.
        period: steps of a turn.
        skip_idle: have torch compute no gradient of the factor whose turn it is not (``requires_grad``): half of the
            adapter's work in backward. Under DDP this needs ``find_unused_parameters=True``.

    Raises:
        OptionError: ``first`` is neither.
        ChoiceError: a turn has no step.
    """

    first: str = "A"
    period: int = 1
    skip_idle: bool = False

    def __post_init__(self) -> None:
        if self.first not in {"A", "B"}:
            raise not_one_of("there is no factor", self.first, ("A", "B"))
        check_settings("AltLoRA", period=(self.period, FROM_1))

    def at(self, step: int) -> str:
        """Return the factor whose turn a step is, counted from 0."""
        return "AB"[(step // self.period + "AB".index(self.first)) % 2]


_DEFAULT_TURNS = AlternatingFactors()


class AltLoRA(PairRule):
    """Each step moves A alone or B alone, in turn, along M; plain SGD applies the rate and the decay.

    On A's turn, with s = alpha/r and B' the B of A's turn before:

        ∇ = (BᵀB + reg·I)⁻¹·g_A/s²,  M ← β₁·(BᵀB + reg·I)⁻¹·Bᵀ·B'·M + (1 − β₁)·∇,  A ← A − η·(M + γ·A)

    and on B's turn the same from the other side. The path of W does not depend on how B·A is factored. AltLoRA+
    (``plus``) divides M by √V + ε, V ← β₂·V + (1 − β₂)·∇∘∇; then it does.

    The other factor has no gradient in the step, so clipping does not measure it. State: two tensors of the factors'
    size each, three with ``plus``.

    Args:
        compiled: as ``Rule``'s.
        optimizer: plain torch.optim.SGD; one optimizer holds both factors.
        plus: AltLoRA+.
        turns: who begins, and for how long.
        betas: (β₁, β₂); default (0.9, 0.999), or (0.999, 0.98) with ``released``.
        reg: default 1e-6, or 1e-3 with ``released``.
        correct_bias: divide M by 1 − β₁ᵗ (and V by 1 − β₂ᵗ, not with ``released``), t the factor's own count of steps;
            default: only with ``released``.
        released: the authors' optimizers: both factors move in each step, B by the A that has just moved, no 1/s²,
            decay after the update, M kept as it was before it is carried over (``plus``).

    Raises:
        Unavailable, AdapterNotFound: as ``Rule``.
        ChoiceError: as ``Rule``; one factor trains without the other; the optimizer is not plain SGD; a setting is out
            of range.
    """

    decides: ClassVar[frozenset[str]] = frozenset({"direction", "rate", "factors"})
    saved: ClassVar[str] = "altlora"
    before_gradients = True

    def __init__(
        self,
        compiled: nn.Module,
        optimizer: Optimizer,
        *,
        plus: bool = False,
        turns: AlternatingFactors = _DEFAULT_TURNS,
        betas: tuple[float, float] | None = None,
        reg: float | None = None,
        correct_bias: bool | None = None,
        released: bool = False,
    ) -> None:
        super().__init__(compiled, optimizer)
        name = type(self).__name__
        self.betas = betas or ((0.999, 0.98) if released else (0.9, 0.999))
        self.reg = (1e-3 if released else 1e-6) if reg is None else reg
        check_settings(name, beta1=(self.betas[0], BELOW_1), beta2=(self.betas[1], BELOW_1), reg=(self.reg, FROM_0))
        check_plain_sgd(self.optimizer, name)
        self.plus, self.released, self.turns, self.steps = plus, released, turns, 0
        self.correct_bias = released if correct_bias is None else correct_bias
        self.skip_idle = turns.skip_idle and not released
        self._sides = [(_FactorSide(pair, 0), _FactorSide(pair, 1)) for pair in self.pairs]
        letters = [(letter, tensor) for pair in self.pairs for letter, tensor in zip("AB", pair.factors, strict=True)]
        self.attach(
            *(tensor.register_hook(functools.partial(self._only_in_turn, letter)) for letter, tensor in letters)
        )
        self._skip(self.turn)

    @property
    def turn(self) -> str:
        """The factor whose turn the next step is: ``"A"``, ``"B"``, or ``"AB"`` in the released form."""
        return "AB" if self.released else self.turns.at(self.steps)

    def before(self) -> None:
        """Replace the gradient of the factor whose turn it is by M, and remove the other's."""
        groups = {id(t): group for group in self.optimizer.param_groups for t in group["params"]}
        for sides in self._sides:
            moved: Tensor | None = None
            for letter, side in zip("AB", sides, strict=True):
                if letter not in self.turn:
                    side.own.grad = None
                elif side.own.grad is not None:
                    moved = self._turn(side, moved, groups[id(side.own)])

    def after(self) -> None:
        """Begin the next turn."""
        self.steps += 1
        self._skip(self.turn)

    def remove(self) -> None:
        super().remove()
        self._skip("AB")

    def state(self) -> State:
        return {"steps": self.steps, "sides": [[dict(side.state) for side in sides] for sides in self._sides]}

    def load_state(self, state: State) -> None:
        check_saved_state(type(self).__name__, state["sides"], self._sides)
        self.steps = state["steps"]
        for sides, saved in zip(self._sides, state["sides"], strict=True):
            for side, own in zip(sides, saved, strict=True):
                side.state = copy_state(own, side.own)
        self._skip(self.turn)

    def _turn(self, side: "_FactorSide", partner: Tensor | None, group: Group) -> Tensor:
        """Set one factor's gradient to its direction; return the factor as it will be after the step.

        Args:
            side: the factor.
            partner: the other one where it moves in this step, too; None: as it is.
            group: of the optimizer, which has the rate and the decay.
        """
        other = side.oriented(side.other if partner is None else partner)
        gram = Gram.of(other.mT, self.reg)
        scale = 1 if self.released else side.pair.scale
        projected = gram.inverse @ side.oriented(side.gradient) / scale**2
        state = side.state
        if not state:  # it begins without momentum
            state.update(step=0, mean=torch.zeros_like(projected), old=other.clone())
            state |= {"square": torch.zeros_like(projected)} if self.plus else {}
        beta1, beta2 = self.betas
        state["step"] += 1
        carried = gram.inverse @ (other.mT @ (state["old"] @ state["mean"]))
        direction = beta1 * carried + (1 - beta1) * projected
        kept = beta1 * state["mean"] + (1 - beta1) * projected if self.released and self.plus else direction
        state.update(mean=kept.clone(), old=other.clone())
        if self.correct_bias:
            direction = direction / (1 - beta1 ** state["step"])
        if self.plus:
            state["square"].mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
            debias = 1 - beta2 ** state["step"] if self.correct_bias and not self.released else 1
            direction = direction / ((state["square"] / debias).sqrt() + _EPS)
        direction = direction.mT.contiguous() if side.is_b else direction
        if self.released:  # its decay acts on the updated factor
            direction = direction * (1 - group["lr"] * group["weight_decay"])
        side.own.grad = direction.to(side.own.dtype)
        return side.own - group["lr"] * (side.own.grad + group["weight_decay"] * side.own)

    def _only_in_turn(self, letter: str, grad: Tensor) -> Tensor:
        """Return the gradient on the factor's turn, otherwise 0, so that clipping measures no other."""
        return grad if letter in self.turn else torch.zeros_like(grad)

    def _skip(self, turn: str) -> None:
        """Require gradients of these factors alone, if factors take turns."""
        for pair in self.pairs if self.skip_idle else ():
            pair.a.requires_grad_("A" in turn)
            pair.b.requires_grad_("B" in turn)


class _FactorSide:
    """One factor of a pair with its state, looked at as if it were A (r, n) and the other one B (m, r)."""

    def __init__(self, pair: Pair, side: int) -> None:
        self.pair, self.is_b = pair, bool(side)
        self.own, self.other = (pair.b, pair.a) if self.is_b else (pair.a, pair.b)
        self.state: State = {}

    @property
    def gradient(self) -> Tensor:
        assert self.own.grad is not None
        return self.own.grad

    def oriented(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the factor's shape, transposed for B, in float32 at least."""
        wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        return wide.mT if self.is_b else wide
