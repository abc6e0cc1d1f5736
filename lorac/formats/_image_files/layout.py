"""The base class of the layouts of one module's tensors."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from lorac.errors import AdapterError, FormatError
from lorac.formats._errors import corrupt_error
from lorac.ir.sites.site import Site
from lorac.variants.base import Variant, WeightVariant

Tensors = Mapping[str, Tensor]
Method = tuple[WeightVariant, dict[str, Tensor]]
"""A method with its hyper-parameters at one site, and its tensors there."""
VariantT = TypeVar("VariantT", bound=Variant)


@dataclass(frozen=True)
class StoredModule:
    """The tensors of one module of a file.

    Attributes:
        site: the layer that it stands for; of several, one with all their rows.
        tensors: by their names in layouts.
        keys: the same, with the names in the file.
        alpha: as the file has it, if it does.
    """

    site: Site
    tensors: Tensors
    keys: Mapping[str, str]
    alpha: float | None = None

    def matrix(self, leaf: str, *shape: int) -> Tensor:
        """Return a tensor as a matrix: all axes but the first are one.

        Args:
            leaf: the tensor.
            shape: its shape in the file, where axes of length 1 at the end may be missing or too many.

        Raises:
            AdapterError: it has another shape.
        """
        tensor = self.reshape(leaf, *shape)
        return tensor[:, None] if tensor.ndim == 1 else tensor.flatten(1)

    def reshape(self, leaf: str, *shape: int) -> Tensor:
        """Return a tensor in its shape in the file, as ``matrix`` takes it."""
        tensor = self.tensors[leaf]
        if _strip_ones(tuple(tensor.shape)) != _strip_ones(shape):
            raise AdapterError(
                f"'{self.keys[leaf]}' has shape {tuple(tensor.shape)}, expected {shape}",
                next_step=f"the site '{self.site.path}' is {self.site.kind} {self.site.in_features} -> "
                f"{self.site.out_features}; rank and base model must be those of the training",
                code="shape_mismatch",
            )
        return tensor.reshape(shape)

    def length(self, leaf: str, axis: int = 0) -> int:
        """Return the length of an axis of a tensor.

        Raises:
            AdapterError: it has no such axis.
        """
        tensor = self.tensors[leaf]
        if tensor.ndim <= axis:
            raise AdapterError(
                f"'{self.keys[leaf]}' has shape {tuple(tensor.shape)}, expected at least {axis + 1} axes",
                next_step="copy the file again, or save the adapter again from its trainer",
                code="shape_mismatch",
            )
        return tensor.shape[axis]

    def without(self, leaves: Collection[str]) -> "StoredModule":
        """Return the module without some tensors."""
        tensors = {leaf: tensor for leaf, tensor in self.tensors.items() if leaf not in leaves}
        return replace(self, tensors=tensors, keys={leaf: self.keys[leaf] for leaf in tensors})

    def renamed(self, names: Mapping[str, str]) -> "StoredModule":
        """Return the module with other names of its tensors."""
        tensors = {names[leaf]: tensor for leaf, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, keys={names[leaf]: key for leaf, key in self.keys.items()})

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape (in, *kernel) of a row of the weight as its module stores it, of a group of channels."""
        conv = self.site.conv
        return (self.site.in_features,) if conv is None else (conv.channels // conv.groups, *conv.kernel)


def _strip_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the axes of length 1 at its end."""
    return shape[: max((axis + 1 for axis, size in enumerate(shape) if size != 1), default=0)]


class ModuleLayout(ABC, Generic[VariantT]):
    """How the tensors of one method lie at one module.

    Attributes:
        required: its tensors, which no other method has.
        optional: further ones of its own, which may be missing.
        variants: the methods that it holds.
        rows: parameters whose first axis is the rows of the weight; all others are the same for all rows. None: rows of
            the weight cannot be taken apart.
        adds: whether W' − W does not depend on W.
    """

    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[type[Variant], ...]]
    rows: ClassVar[tuple[str, ...] | None] = None
    adds: ClassVar[bool] = False

    @abstractmethod
    def read(self, module: StoredModule) -> Method:
        """Return the method of a module, and its tensors as matrices.

        Raises:
            AdapterError: a tensor has another shape than the site asks for.
            FormatError: they make no method.
        """

    @abstractmethod
    def write(self, variant: VariantT, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        """Return the tensors as a file has them; the inverse of ``read``.

        Args:
            variant: the method at the site.

        Raises:
            FormatError: a file has no place for their values.
        """

    def alpha(self, variant: VariantT) -> float | None:
        """Return the alpha that a file stores; None for methods that have none."""
        alpha: Any = variant.settings.get("alpha")
        return None if alpha is None else float(alpha)

    @property
    def leaves(self) -> tuple[str, ...]:
        """All its tensors."""
        return (*self.required, *self.optional)

    def check(self, module: StoredModule, owner: str) -> None:
        """Refuse tensors that are missing or too many.

        Raises:
            FormatError: naming the first.
        """
        own = next(key for leaf, key in module.keys.items() if leaf in self.leaves)
        for leaf in self.required:
            if leaf not in module.tensors:
                raise corrupt_error(
                    f"{owner} has '{own}', and lacks the tensor '{leaf}' of the same module",
                    next_step="copy the file again, or save the adapter again from its trainer",
                )
        for leaf, key in module.keys.items():
            if leaf not in self.leaves:
                raise unused_tensor(owner, key, f"with '{own}' at the same module")


AnyLayout = ModuleLayout[Any]


def unused_tensor(owner: str, key: str, why: str) -> FormatError:
    """Return the error for a tensor that no method uses."""
    return FormatError(
        f"{owner} has the tensor '{key}', which no method here uses {why}",
        next_step="it may change the result, so it is not left out; save the adapter again from its trainer",
        code="unused_tensors",
    )
