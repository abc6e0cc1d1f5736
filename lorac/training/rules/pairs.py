"""Rules on LoRA's two factors: their base class, Gram matrices, and checks of optimizers and settings."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorac.errors import ChoiceError
from lorac.training.rule import Rule, State, TrainedTerm
from lorac.variants.base import Variant
from lorac.variants.lora import LoRA

FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True, eq=False)
class Pair:
    """LoRA's factors at one site, ΔW = s·B·A; for a stack of matrices each factor has a leading axis.

    Attributes:
        term: the adapter and site.
        a: A (r, in).
        b: B (out, r).
        scale: s.
    """

    term: TrainedTerm
    a: Tensor
    b: Tensor
    scale: float

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.a, self.b


class PairRule(Rule):
    """A rule that moves both factors of LoRAs.

    Attributes:
        pairs: those whose factors train.

    Raises:
        ChoiceError: as ``Rule``; only one factor of a pair trains, or no pair does.
    """

    methods: ClassVar[tuple[type[Variant], ...]] = (LoRA,)
    governed: ClassVar[tuple[str, ...]] = FACTORS

    @abstractmethod
    def __init__(self, compiled: nn.Module, optimizer: Optimizer) -> None:
        super().__init__(compiled, optimizer)
        self.pairs: list[Pair] = []
        name = type(self).__name__
        for term in self.terms:
            a, b = (term.tensors[factor] for factor in FACTORS)
            if a.requires_grad != b.requires_grad:
                raise ChoiceError(
                    f"{name} updates both factors of {term}, but only {FACTORS[b.requires_grad]} trains",
                    next_step="turn requires_grad on, or off, for both",
                )
            assert isinstance(term.variant, LoRA)
            self.pairs += [Pair(term, a, b, term.variant.scale)] if a.requires_grad else []
        if not self.pairs:
            raise ChoiceError(
                f"no factor of {name} is trained", next_step="turn requires_grad on for an adapter's factors"
            )


def check_plain_sgd(optimizer: Optimizer, rule: str) -> None:
    """Raise ``ChoiceError`` unless an optimizer is plain SGD, for rules that keep moments themselves.

    Args:
        optimizer: torch's own.
        rule: name of the rule, for the message.
    """
    plain = type(optimizer) is torch.optim.SGD and not any(
        group["momentum"] or group["maximize"] for group in optimizer.param_groups
    )
    if not plain:
        raise ChoiceError(
            f"{rule} computes the moments itself, and {type(optimizer).__name__} would add its own",
            nearest="torch.optim.SGD(parameters, lr=lr)",
            next_step="give it the weight decay, if any, and no momentum",
        )


@dataclass(frozen=True)
class SettingRange:
    """The finite numbers that a setting may have.

    Attributes:
        text: the range in words.
        admits: whether a number is in the range.
    """

    text: str
    admits: Callable[[float], bool]


FROM_0 = SettingRange("from 0 on", lambda value: value >= 0)
ABOVE_0 = SettingRange("above 0", lambda value: value > 0)
FROM_1 = SettingRange("from 1 on", lambda value: value >= 1)
BELOW_1 = SettingRange("from 0 on, below 1", lambda value: 0 <= value < 1)
SHARE = SettingRange("from 0 to 1", lambda value: 0 <= value <= 1)


def check_settings(rule: str, **settings: tuple[float, SettingRange]) -> None:
    """Raise ``ChoiceError`` if a setting is not finite, or outside its range.

    Args:
        rule: name of the rule.
        settings: setting -> (value, range).
    """
    for name, (value, allowed) in settings.items():
        if not (math.isfinite(value) and allowed.admits(value)):
            raise ChoiceError(f"{rule} does not take {name}={value}", next_step=f"give a finite number {allowed.text}")


@dataclass(frozen=True, eq=False)
class Gram:
    """F·Fᵀ + reg·I of a factor F (r, n), by its eigenvalues: its inverse on its range, in float32 at least.

    Attributes:
        values: eigenvalues (r,), none below 0.
        vectors: eigenvectors (r, r), by column.
        inverse: (r, r); reciprocals of eigenvalues that are only rounding are 0.
    """

    values: Tensor
    vectors: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, factor: Tensor, reg: float) -> "Gram":
        """Decompose the Gram matrix of a factor (r, n)."""
        wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
        gram = wide @ wide.mT
        gram.diagonal(dim1=-2, dim2=-1).add_(reg)
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0)
        noise = values.shape[-1] * torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True)
        reciprocals = torch.where(values > noise, 1 / values, 0)
        return cls(values, vectors, (vectors * reciprocals.unsqueeze(-2)) @ vectors.mT)


def check_saved_state(rule: str, saved: Sequence[object], own: Sequence[object]) -> None:
    """Raise ``ChoiceError`` if a state was saved for other tensors, or by another form of the rule."""
    if len(saved) != len(own):
        raise ChoiceError(
            f"the saved state of {rule} has moments of {len(saved)} tensors, and the rule has {len(own)}",
            next_step="attach the rule with the same settings and adapters",
        )


def copy_state(state: State, like: Tensor) -> State:
    """Copy a saved state, its tensors to the device of ``like``; their dtypes stay."""
    copied: State = {}
    for key, value in state.items():
        inner = copy_state(value, like) if isinstance(value, dict) else value
        copied[key] = inner.detach().to(like.device, copy=True) if isinstance(inner, Tensor) else inner
    return copied
