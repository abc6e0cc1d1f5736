"""The tensors of a method: what training and files do with each, its shape, and how it starts."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site


class Role(enum.StrEnum):
    """What training and files do with a tensor."""

    TRAINABLE = "trainable"
    FROZEN = "frozen"
    BUFFER = "buffer"
    INDEX = "index"
    """Integer positions; saved, never trained, never cast."""


@dataclass(frozen=True)
class InitContext:
    """What an initialiser may look at.

    Attributes:
        shape: shape of the tensor to make.
        site: where it goes.
        weight: reads the site's base weight as a matrix (out, in); lazy, for it may be large.
        params: the tensors of this site made so far, in the order of ``params(site)``.
        generator: source of randomness, seeded per adapter and site.
        name: the adapter's name.
    """

    shape: tuple[int, ...]
    site: Site
    weight: Callable[[], torch.Tensor]
    params: Params
    generator: torch.Generator
    name: str


Init = Callable[[InitContext], torch.Tensor]


def _matrix_context(context: InitContext, shape: tuple[int, ...], number: int) -> InitContext:
    """What an initialiser may look at for one matrix of a stack."""
    made = Params(**{name: tensor[number] for name, tensor in vars(context.params).items()})
    return replace(context, shape=shape, weight=lambda: context.weight()[number], params=made)


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of a variant at one site.

    Attributes:
        shape: shape at this site, in the matrix convention (out, in); kernels flattened.
        init: makes the start value.
        role: trainable, frozen, buffer or index.
        shared: one tensor for the whole adapter instead of one per site, as large in every axis as its largest site
            asks; a formula takes the corner it needs.
        decay: whether weight decay customarily applies (metadata for trainers).
        below: of an index (n, K): the sizes of the n axes that its columns point into. No two columns are the same.
    """

    shape: tuple[int, ...]
    init: Init
    role: Role = Role.TRAINABLE
    shared: bool = False
    decay: bool = True
    below: tuple[int, ...] = ()

    def stacked(self, number: int) -> ParamSpec:
        """Of a stack of matrices: a tensor for each, each begun as a matrix's by itself is."""

        def init(context: InitContext) -> torch.Tensor:
            return torch.stack([self.init(_matrix_context(context, self.shape, i)) for i in range(number)])

        return replace(self, shape=(number, *self.shape), init=init)

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape will do."""
        if not self.shared:
            return shape == self.shape
        return len(shape) == len(self.shape) and all(a >= b for a, b in zip(shape, self.shape, strict=True))
