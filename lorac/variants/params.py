"""The tensors of a method: their shapes, their start values, and how training and files treat them."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites.site import Site


class Role(enum.StrEnum):
    """How training and files treat a tensor."""

    TRAINABLE = "trainable"
    FROZEN = "frozen"
    BUFFER = "buffer"
    INDEX = "index"
    """Integer positions: saved, and never trained or cast."""


@dataclass(frozen=True)
class InitContext:
    """Values that an initialiser may read.

    Attributes:
        shape: shape of the tensor to make.
        site: the site of the tensor.
        weight: function that reads the site's base weight as a matrix (out, in), which may be large.
        params: the tensors of this site made so far, in the order of ``params(site)``.
        generator: source of randomness, seeded per adapter and site.
        name: the adapter's name.
        weights: function that reads the base weights of all sites that share the tensor, in the model's order.
        bias: function that reads the site's base bias (out,); it returns None for a site without one.
    """

    shape: tuple[int, ...]
    site: Site
    weight: Callable[[], torch.Tensor]
    params: Params
    generator: torch.Generator
    name: str
    weights: Callable[[], list[torch.Tensor]] = list
    bias: Callable[[], torch.Tensor | None] = lambda: None


Init = Callable[[InitContext], torch.Tensor]


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of a variant at one site.

    Attributes:
        shape: shape at this site, in the matrix convention (out, in); kernels flattened.
        init: function that makes the start value.
        role: trainable, frozen, buffer or index.
        shared: whether the whole adapter has one tensor instead of one per site; each axis has the largest size of any
            site, and a formula uses the first entries that its site needs.
        decay: whether weight decay customarily applies (metadata for trainers).
        below: for an index (n, K): the sizes of the n axes that it indexes. All columns differ.
        of_gradients: whether only the backward pass reads the tensor, so that no output depends on it.
        tie: sites whose specs have the same text here share one tensor; empty: each site has a separate tensor.
    """

    shape: tuple[int, ...]
    init: Init
    role: Role = Role.TRAINABLE
    shared: bool = False
    decay: bool = True
    below: tuple[int, ...] = ()
    of_gradients: bool = False
    tie: str = ""

    def stacked(self, number: int) -> "ParamSpec":
        """Return the spec for a stack of matrices: one tensor per matrix, each initialised like a single matrix's."""

        def init_one(context: InitContext, index: int) -> torch.Tensor:
            params = Params(**{name: tensor[index] for name, tensor in vars(context.params).items()})
            inner = replace(context, shape=self.shape, weight=lambda: context.weight()[index], params=params)
            return self.init(inner)

        def init_stack(context: InitContext) -> torch.Tensor:
            return torch.stack([init_one(context, index) for index in range(number)])

        return replace(self, shape=(number, *self.shape), init=init_stack)

    def admits(self, shape: tuple[int, ...]) -> bool:
        """Return whether a tensor of this shape fits."""
        if not self.shared:
            return shape == self.shape
        return len(shape) == len(self.shape) and all(a >= b for a, b in zip(shape, self.shape, strict=True))


def select_params(p: Params, prefix: str) -> Params:
    """Return the tensors whose names begin with ``prefix``, under names without the prefix."""
    return Params(**{key.removeprefix(prefix): value for key, value in vars(p).items() if key.startswith(prefix)})
