"""An adapter: a name, a method with its hyper-parameters, and its tensors."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lorac.errors import AdapterError, ChoiceError
from lorac.variants.base import Tensor, Variant

TOKEN_ROWS = "rows"
"""Entry of the provenance: name of a replaced weight -> the numbers of its rows that train, where not all do."""
_BASE_FACTS = ("base", "layout", TOKEN_ROWS)
"""Entries of the provenance: the hash of the base's weights, the layouts of the sites, and rows that train."""


@dataclass(eq=False)
class Adapter:
    """An adapter: a name, a variant, the sites it targets, and its tensors.

    Attributes:
        name: the name by which ``swap`` selects it.
        variant: the method and its hyper-parameters.
        tensors: site path -> parameter name -> tensor, in the matrix convention. Parameters that sites share
            are the same tensor object at each.
        replaced: fully qualified parameter name -> the tensor that replaces it (modules_to_save, trained biases).
        provenance: its origin, and the records of its file (base hash, format, original configuration).
    """

    name: str
    variant: Variant
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def base_facts(self) -> dict[str, Any]:
        """Entries of the provenance about the base, which are true of another adapter of the same sites too."""
        return {name: self.provenance[name] for name in _BASE_FACTS if name in self.provenance}

    @property
    def sites(self) -> tuple[str, ...]:
        """The paths of the sites that it adapts, in order."""
        return tuple(self.tensors)

    def parameters(self) -> Iterable[Tensor]:
        """Return every distinct tensor of the adapter."""
        own = [tensor for at in self.tensors.values() for tensor in at.values()]
        return {id(tensor): tensor for tensor in (*own, *self.replaced.values())}.values()

    def to(self, dtype: torch.dtype) -> "Adapter":
        """Return a copy with its floating-point tensors in a dtype; tensors that sites share stay one.

        Raises:
            AdapterError: a value is larger than the dtype can hold.
        """
        cast = {id(tensor): _cast(self.name, tensor, dtype) for tensor in self.parameters()}
        tensors = {path: {key: cast[id(tensor)] for key, tensor in at.items()} for path, at in self.tensors.items()}
        return replace(self, tensors=tensors, replaced={name: cast[id(one)] for name, one in self.replaced.items()})

    def join_replaced(self, other: "Adapter") -> None:
        """Replace the parameters that another adapter replaces, too.

        Raises:
            ChoiceError: this one replaces one of them already.
        """
        conflicts = self.replaced.keys() & other.replaced.keys()
        if conflicts:
            raise ChoiceError(
                f"'{other.name}' replaces '{min(conflicts)}', and so does an adapter before it",
                next_step=f"only one adapter of a {self.variant.name} may replace a parameter",
            )
        self.replaced |= other.replaced

    def __repr__(self) -> str:
        dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.parameters()}))
        replaced = f"replaced parameters: {len(self.replaced)}, " if self.replaced else ""
        values = f"values: {self.numel()}" + (f" ({dtypes})" if dtypes else "")
        return f"<Adapter {self.name!r}: {self.variant.name}, sites: {len(self.tensors)}, {replaced}{values}>"

    def numel(self) -> int:
        """Return the number of stored values; shared tensors count once."""
        return sum(t.numel() for t in self.parameters())


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.detach().to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise AdapterError(
            f"a value of adapter '{name}' is larger than {str(dtype).removeprefix('torch.')} can hold",
            next_step="keep a wider dtype; bfloat16 has the range of float32",
            code="non_finite",
        )
    return cast
