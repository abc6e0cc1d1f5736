"""An adapter: a name, a method with its hyper-parameters, and its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from lorac.variants.base import Variant

Tensor = torch.Tensor


@dataclass(eq=False)
class Adapter:
    """An adapter: a name, a variant, the sites it targets, and its tensors.

    Attributes:
        name: how ``swap`` calls it.
        variant: the method and its hyper-parameters.
        tensors: site path -> parameter name -> tensor, in the matrix convention. Parameters shared by all sites are
            the same tensor object at each.
        replaced: fully qualified parameter name -> the tensor that takes its place (modules_to_save, trained biases).
        provenance: where it came from, and what its file recorded (base hash, format, original configuration).
    """

    name: str
    variant: Variant
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of the sites it adapts, in order."""
        return tuple(self.tensors)

    def parameters(self) -> Iterable[Tensor]:
        """Every distinct tensor of the adapter."""
        own = [tensor for at in self.tensors.values() for tensor in at.values()]
        return {id(tensor): tensor for tensor in (*own, *self.replaced.values())}.values()

    def numel(self) -> int:
        """Number of stored values, shared tensors counted once."""
        return sum(t.numel() for t in self.parameters())
