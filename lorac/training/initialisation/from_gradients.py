"""Initialisers that read the gradient of full fine-tuning: LoRA-GA, LoRA-One, LoRA-SB.

LoRA-GA: Wang et al. 2024, arXiv 2407.05000; LoRA-One: Zhang et al. 2025, arXiv 2502.01235; LoRA-SB: Ponkshe, Singhal
et al. 2024, arXiv 2411.19557.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from lorac.adapters.residual_base import FactorPair
from lorac.errors import OptionError, not_one_of
from lorac.ir.sites.site import Site
from lorac.training.initialisation.gradients import Loss, SummedGradients, sum_gradients
from lorac.training.initialisation.initialiser import Batches, InitialisationSite, Initialiser, PairInitialiser
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.lora import LoRA
from lorac.variants.lora_xs import LoRAXS

_SPLITS = {"ArB2r": (slice(0, 1), slice(1, 2)), "A2rBr": (slice(1, 2), slice(0, 1))}
"""Direction -> the slices of the first 2r components for A and B, in units of r."""


def first_rate(lr: float, warmup: float, steps: int) -> float:
    """η₁ = lr/(warmup·steps), the learning rate of the first step of a linear warm-up; lr where there is none.

    Args:
        lr: the largest learning rate.
        warmup: share of the steps that the rate rises in.
        steps: of the whole training.

    Raises:
        OptionError: one of them is out of range.
    """
    if lr <= 0 or not 0 <= warmup <= 1 or steps < 1:
        raise OptionError(
            f"lr={lr}, warmup={warmup}, steps={steps} are not a rate, a share of the steps and a number of steps",
            next_step="give for example lr=1e-4, warmup=0.02, steps=1000",
        )
    return lr / max(warmup * steps, 1)


class _GradientInitialiser(PairInitialiser):
    """A and B by a rule that reads the mean gradient at the base."""

    reads: ClassVar[str] = "gradients"
    loss: Loss | None

    def read(self, model: nn.Module, sites: Mapping[str, Site], batches: Batches) -> Mapping[str, Tensor]:
        found = sum_gradients(model, sites, batches, self.loss)
        for total in {id(one): one for one in found.sums.values()}.values():  # tied weights have one sum
            total.div_(found.batches)
        return found.sums


@dataclass(frozen=True, kw_only=True)
class LoRAGA(_GradientInitialiser):
    """A and B from two halves of the first 2r components of G = U·Σ·Vᵀ, so that the first step moves W as G does.

    With ζ = out^¼/√gamma, A = ζ·V_{1..r}ᵀ and B = ζ·U_{r+1..2r}; the base keeps W − s·B·A.

    Attributes:
        gamma: PEFT's stable_gamma.
        direction: ``"ArB2r"``, the paper's, or ``"A2rBr"``, with the halves exchanged.
        peft: PEFT's form: A without ζ, and the rows of B times their singular values.
        loss: (model, batch) -> the loss; default: the model's own.

    Raises:
        OptionError: there is no such direction, or gamma is not above 0.
    """

    gamma: float = 16
    direction: str = "ArB2r"
    peft: bool = False
    loss: Loss | None = None

    vectors: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.direction not in _SPLITS:
            raise not_one_of("there is no direction", self.direction, _SPLITS)
        _check_gamma(self.gamma)

    def pair(self, place: InitialisationSite) -> FactorPair:
        u, s, vh = torch.linalg.svd(place.read, full_matrices=False)
        r = place.variant.r
        of_a, of_b = (slice(part.start * r, part.stop * r) for part in _SPLITS[self.direction])
        a, b = vh[..., of_a, :], u[..., of_b]
        zeta = place.weight.shape[-2] ** 0.25 / self.gamma**0.5
        return (a, zeta * b * s[..., None, of_b]) if self.peft else (zeta * a, zeta * b)


@dataclass(frozen=True, kw_only=True)
class LoRAOne(_GradientInitialiser):
    """B = U_r·√(Σ_r/(σ₁·gamma)), A = √(Σ_r/(σ₁·gamma))·V_rᵀ of −G = U·Σ·Vᵀ: one step of full fine-tuning, scaled.

    W' is not W at the start, by design.

    Attributes:
        gamma: how small the step is.
        residual: take s·B·A out of the base, so that training begins at the base's output.
        loss: (model, batch) -> the loss; default: the model's own.

    Raises:
        OptionError: gamma is not above 0.
    """

    gamma: float = 128
    residual: bool = False
    loss: Loss | None = None

    methods: ClassVar[tuple[type[Variant], ...]] = (LoRA,)

    def __post_init__(self) -> None:
        _check_gamma(self.gamma)

    def pair(self, place: InitialisationSite) -> FactorPair:
        u, s, vh = torch.linalg.svd(-place.read, full_matrices=False)
        r = place.variant.r
        # A gradient of 0 has no direction, and begins at the base.
        first = s[..., :1].clamp_min(torch.finfo(s.dtype).tiny)
        root = (s[..., :r] / first / self.gamma).sqrt()
        return root[..., :, None] * vh[..., :r, :], u[..., :r] * root[..., None, :]


@dataclass(frozen=True, kw_only=True)
class LoRASB(Initialiser):
    """LoRA-XS whose core begins at the best approximation of rank r of AdamW's first step, ΔW₀ = −η₁·sign(ΣG).

    W' is not W at the start, by design. ``LoRAXS.from_update`` is the same from an update of one's own.

    Attributes:
        lr, warmup, steps: of the training that follows: η₁ = lr/(warmup·steps) (``first_rate``).
        loss: (model, batch) -> the loss; default: the model's own.

    Raises:
        OptionError: one of lr, warmup and steps is out of range.
    """

    lr: float
    warmup: float = 0.02
    steps: int
    loss: Loss | None = None

    methods: ClassVar[tuple[type[Variant], ...]] = (LoRAXS,)
    reads: ClassVar[str] = "gradients"

    def __post_init__(self) -> None:
        first_rate(self.lr, self.warmup, self.steps)

    def begin(self, adapter: Adapter, model: nn.Module, sites: Mapping[str, Site], batches: Batches) -> Adapter:
        return self.begin_from(adapter, sum_gradients(model, sites, batches, self.loss))

    def begin_from(self, adapter: Adapter, gradients: SummedGradients) -> Adapter:
        """Initialise from gradients that are summed already (``lorac.training.initialisation.sum_gradients``)."""
        variant = adapter.variant
        assert isinstance(variant, LoRAXS)
        rate = first_rate(self.lr, self.warmup, self.steps)
        updates = {path: -rate * gradients.sums[path].sign() for path in adapter.tensors}
        made = LoRAXS.from_update(updates, name=adapter.name, r=variant.r, alpha=variant.alpha)
        return replace(adapter, tensors=made.tensors, provenance=dict(adapter.provenance))


def _check_gamma(gamma: float) -> None:
    if not gamma > 0:
        raise OptionError(f"gamma={gamma} is out of range", next_step="give a number above 0")
