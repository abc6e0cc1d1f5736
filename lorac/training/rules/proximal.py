"""SoRA's rule: after every step the gates go through a proximal map, which closes the small ones.

Ding et al., EMNLP 2023, arXiv 2311.11696.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lorac.errors import ChoiceError, not_one_of
from lorac.training.rule import Rule, trained_terms, unwrap_ddp
from lorac.variants.adaptive_rank import SoRA
from lorac.variants.base import Variant

ChoiceT = TypeVar("ChoiceT")


def soft_threshold(g: Tensor, xi: float) -> Tensor:
    """``sign(g)·max(|g| − ξ, 0)``, elementwise: the proximal map of ξ·|g| (section 3 of the paper).

    Args:
        g: gates, of any shape.
        xi: the threshold ξ ≥ 0.
    """
    return F.softshrink(g, xi)


def sora_code_threshold(g: Tensor, xi: float) -> Tensor:
    """Apply the released code's threshold: entries beyond ξ shrink by ξ, then entries below ξ become 0.

    So entries below 2ξ close, except those of exactly ±ξ, which neither step touches.
    """
    shrunk = torch.where(g.abs() > xi, g - xi * g.sign(), g)
    return torch.where(shrunk.abs() < xi, torch.zeros_like(g), shrunk)


_MAPS: Mapping[str, Callable[[Tensor, float], Tensor]] = {"soft": soft_threshold, "sora_code": sora_code_threshold}
_SPACINGS: Mapping[str, Callable[[float, float, int], Any]] = {
    "linear": np.linspace,
    # log(linspace(e^first, e^last)), in a form that keeps the digits of small thresholds.
    "log_linear": lambda first, last, count: np.log1p(np.linspace(np.expm1(first), np.expm1(last), count)),
    "exp_linear": np.geomspace,
}


class ProximalGates(Rule):
    """A proximal map of the gates that moved, after every step: small ones become exactly 0.

    A closed gate still has a gradient, and opens again when one step carries it beyond the threshold; its rows and
    columns of A and B have none while it is closed. The gates belong in a parameter group without weight decay; the
    paper gives them an optimizer of their own, which is then the one to pass here.

    Args:
        compiled: as ``Rule``'s.
        optimizer: as ``Rule``'s; it may hold the gates alone.
        threshold: ξ, not multiplied by the learning rate. It may be set anew while training: the paper's sparsifying
            scheduler trains at each of ``thresholds(...)`` in turn, with a learning-rate schedule of its own for each.
        prox: ``"soft"``, the paper's map, or ``"sora_code"``, the released code's.

    Raises:
        Unavailable, AdapterNotFound: as ``Rule``; also ChoiceError where the threshold is negative or not finite.
        OptionError: there is no such map.
    """

    methods: ClassVar[tuple[type[Variant], ...]] = (SoRA,)
    governed: ClassVar[tuple[str, ...]] = ("gate",)
    decides: ClassVar[frozenset[str]] = frozenset({"factors"})

    def __init__(
        self, compiled: nn.Module, optimizer: Optimizer, *, threshold: float = 1e-3, prox: str = "soft"
    ) -> None:
        super().__init__(compiled, optimizer)
        self.threshold = threshold
        self._map = _look_up(prox, _MAPS, "proximal map")
        self._gates = [term.tensors["gate"] for term in self.terms if term.tensors["gate"].requires_grad]
        self.attach()

    @property
    def threshold(self) -> float:
        """ξ."""
        return self._threshold

    @threshold.setter
    def threshold(self, xi: float) -> None:
        if not 0 <= xi < math.inf:
            raise ChoiceError(f"a threshold of {xi} closes no gates", next_step="give a finite number from 0 on")
        self._threshold = xi

    def after(self) -> None:
        """Apply the proximal map."""
        for gate in self._gates:
            if gate.grad is not None:
                gate.copy_(self._map(gate, self._threshold))


def gate_penalty(compiled: nn.Module, weight: float) -> Tensor:
    """``λ₁·Σ|g| / N`` over the N gates of the active SoRA adapters: a scalar to add to the loss.

    The released code adds this subgradient to the proximal map; the paper's method is the map alone, λ₁ = 0.

    Args:
        compiled: the result of ``lorac.compile(..., target="eager")``.
        weight: λ₁.

    Raises:
        Unavailable, AdapterNotFound: as ``Rule``.
        ChoiceError: no SoRA adapter is active.
    """
    active = unwrap_ddp(compiled).active
    gates = [term.tensors["gate"] for term in trained_terms(compiled, (SoRA,)) if term.adapter in active]
    if not gates:
        raise ChoiceError("no sora adapter is active, so no gate to penalise", next_step="swap to one first")
    return weight * torch.cat(gates).abs().mean()


def thresholds(first: float, last: float, count: int, spacing: str = "linear") -> tuple[float, ...]:
    """``count`` thresholds from ``first`` to ``last``, for the paper's sparsifying scheduler (section 3).

    Args:
        first: ξ₀.
        last: ξ_max.
        count: how many.
        spacing: ``"linear"``; ``"log_linear"``, linear in e^ξ; ``"exp_linear"``, geometric, from above 0.

    Raises:
        OptionError: there is no such spacing.
        ChoiceError: the ends are not 0 ≤ first ≤ last, or first = 0 is to be spaced geometrically.
    """
    space = _look_up(spacing, _SPACINGS, "spacing")
    if count < 1 or not 0 <= first <= last < math.inf:
        raise ChoiceError(
            f"no {count} thresholds go from {first:g} to {last:g}", next_step="give 0 <= first <= last and count >= 1"
        )
    if spacing == "exp_linear" and first == 0:
        raise ChoiceError(
            "no geometric spacing begins at 0", nearest="log_linear", next_step="take that spacing, or first= above 0"
        )
    return tuple(float(xi) for xi in space(first, last, count))


def _look_up(name: str, known: Mapping[str, ChoiceT], what: str) -> ChoiceT:
    if name not in known:
        raise not_one_of(f"there is no {what}", name, known)
    return known[name]
