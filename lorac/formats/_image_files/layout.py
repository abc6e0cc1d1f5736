"""The base class of layouts: how a file stores the tensors of one module."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from lorac.errors import FormatError, shape_error, unused_error
from lorac.formats._errors import corrupt_error
from lorac.ir.sites.site import Site
from lorac.variants.base import Variant, WeightVariant

Tensors = Mapping[str, Tensor]
Method = tuple[WeightVariant, dict[str, Tensor]]
"""A method with its hyper-parameters at one site, and its tensors there."""
VariantT = TypeVar("VariantT", bound=Variant)


@dataclass(frozen=True)
class StoredModule:
    """The tensors that a file has for one module.

    Attributes:
        site: the layer that the module stands for; for several layers, one site with the rows of all.
        tensors: by the layout's names.
        keys: the key in the file of each tensor, by the layout's names.
        alpha: the alpha in the file; None where the file has none.
    """

    site: Site
    tensors: Tensors
    keys: Mapping[str, str]
    alpha: float | None = None

    def matrix(self, leaf: str, *shape: int) -> Tensor:
        """Return a tensor as a matrix, with all axes after the first flattened into one.

        Args:
            leaf: the tensor.
            shape: the shape in the file; axes of length 1 at the end may be missing or added.

        Raises:
            AdapterError: the tensor has another shape.
        """
        tensor = self.reshape(leaf, *shape)
        return tensor[:, None] if tensor.ndim == 1 else tensor.flatten(1)

    def reshape(self, leaf: str, *shape: int) -> Tensor:
        """Return a tensor reshaped to its nominal shape in the file; arguments and errors as for ``matrix``."""
        tensor = self.tensors[leaf]
        if _strip_ones(tuple(tensor.shape)) != _strip_ones(shape):
            raise shape_error(
                f"'{self.keys[leaf]}' has shape {tuple(tensor.shape)}, expected {shape}",
                next_step=f"use the rank and the base model of the training; the site '{self.site.path}' is "
                f"{self.site.kind} {self.site.in_features} -> {self.site.out_features}",
            )
        return tensor.reshape(shape)

    def length(self, leaf: str, axis: int = 0) -> int:
        """Return the length of an axis of a tensor.

        Raises:
            AdapterError: the tensor has no such axis.
        """
        tensor = self.tensors[leaf]
        if tensor.ndim <= axis:
            raise shape_error(
                f"'{self.keys[leaf]}' has shape {tuple(tensor.shape)}, expected at least {axis + 1} axes",
                next_step="copy the file again, or save the adapter again from its trainer",
            )
        return tensor.shape[axis]

    def without(self, leaves: Collection[str]) -> "StoredModule":
        """Return the module without some tensors."""
        tensors = {leaf: tensor for leaf, tensor in self.tensors.items() if leaf not in leaves}
        return replace(self, tensors=tensors, keys={leaf: self.keys[leaf] for leaf in tensors})

    def renamed(self, names: Mapping[str, str]) -> "StoredModule":
        """Return the module with its tensors renamed."""
        tensors = {names[leaf]: tensor for leaf, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, keys={names[leaf]: key for leaf, key in self.keys.items()})

    @property
    def columns(self) -> tuple[int, ...]:
        """The shape (in, *kernel) of one row of the stored weight; in counts the channels of one group."""
        conv = self.site.conv
        return (self.site.in_features,) if conv is None else (conv.channels // conv.groups, *conv.kernel)


def _strip_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without trailing axes of length 1."""
    return shape[: max((axis + 1 for axis, size in enumerate(shape) if size != 1), default=0)]


class ModuleLayout(ABC, Generic[VariantT]):
    """The layout of one method's tensors at one module.

    Attributes:
        required: the names of tensors that must be present, and that no other method has.
        optional: the names of further tensors of the method.
        variants: the methods that the layout can store.
        rows: parameters whose first axis is the rows of the weight; all other parameters are shared by all rows. None
            where the weight cannot be split by rows.
        adds: whether W' − W is independent of W.
    """

    required: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[tuple[type[Variant], ...]]
    rows: ClassVar[tuple[str, ...] | None] = None
    adds: ClassVar[bool] = False

    @abstractmethod
    def read(self, module: StoredModule) -> Method:
        """Return the method of a module, and the module's tensors as matrices.

        Raises:
            AdapterError: a tensor has a shape that the site does not allow.
            FormatError: the tensors do not make up the method.
        """

    @abstractmethod
    def write(self, variant: VariantT, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        """Convert a method's parameters to the tensors of a file; the inverse of ``read``.

        Args:
            variant: the method at the site.

        Raises:
            FormatError: the file cannot store their values.
        """

    def alpha(self, variant: VariantT) -> float | None:
        """Return the alpha to store in a file; None for methods without an alpha."""
        alpha: Any = variant.settings.get("alpha")
        return None if alpha is None else float(alpha)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The names of all tensors, required and optional."""
        return (*self.required, *self.optional)

    def check(self, module: StoredModule, owner: str) -> None:
        """Refuse a module that lacks a required tensor, or has a tensor that the method does not use.

        Raises:
            FormatError: naming the first such tensor.
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
    return unused_error(
        f"{owner} has the tensor '{key}', and no method here uses it {why}",
        next_step="save the adapter again from its trainer; the tensor may change the result, so it is not left out",
    )
