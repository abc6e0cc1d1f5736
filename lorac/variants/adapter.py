"""An adapter: a name, a method with its hyper-parameters, and its tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lorac.variants.base import Tensor, Variant


@dataclass(eq=False)
class Adapter:
    """An adapter: a name, a variant, the sites it targets, and its tensors.

    Attributes:
        name: the name by which ``swap`` selects it.
        variant: the method and its hyper-parameters.
        tensors: site path -> parameter name -> tensor, in the matrix convention. Parameters that sites share
            are the same tensor object at each.
        replaced: fully qualified parameter name -> the tensor that replaces it (modules_to_save, trained biases).
        provenance: its origin, and what its file recorded (base hash, format, original configuration).
    """

    name: str
    variant: Variant
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        """The paths of the sites that it adapts, in order."""
        return tuple(self.tensors)

    def parameters(self) -> Iterable[Tensor]:
        """Return every distinct tensor of the adapter."""
        own = [tensor for at in self.tensors.values() for tensor in at.values()]
        return {id(tensor): tensor for tensor in (*own, *self.replaced.values())}.values()

    def numel(self) -> int:
        """Return the number of stored values; shared tensors count once."""
        return sum(t.numel() for t in self.parameters())
