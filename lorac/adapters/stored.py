"""Adapters on disk, and the contents of their slots in one block of memory."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorac.ir.slots.composition import ComposedSite, ComposedWeights
from lorac.ir.slots.plans import BranchTerm
from lorac.ir.slots.stacks import StackShape
from lorac.variants.adapter import Adapter


@dataclass(frozen=True, eq=False)
class SlotLayout:
    """The order of slots in memory, which adapters of one structure share.

    Attributes:
        sites: the sites that the adapter touches, without their tensors.
        stacks: each stack and the names of its slots, in the order of the bytes.
    """

    sites: Mapping[str, ComposedSite]
    stacks: tuple[tuple[StackShape, tuple[str, ...]], ...]

    @classmethod
    def of(cls, snapshot: ComposedWeights, tensors: Mapping[str, Tensor]) -> "SlotLayout":
        """Return the layout of an adapter.

        Args:
            snapshot: the adapter composed at every site.
            tensors: the contents of its slots.
        """
        groups: dict[tuple[tuple[int, ...], torch.dtype], list[str]] = {}
        for name, tensor in tensors.items():
            groups.setdefault((tuple(tensor.shape), tensor.dtype), []).append(name)
        stacks = tuple((StackShape(len(names), shape, dtype), tuple(names)) for (shape, dtype), names in groups.items())
        sites = {}
        for path, site in snapshot.composed.items():
            branches = tuple((strength, BranchTerm(term.slot, ())) for strength, term in site.branches)
            sites[path] = replace(site, change=None, branches=branches)
        return cls(sites, stacks)

    @property
    def key(self) -> tuple[object, ...]:
        """A key that is equal for equal layouts."""
        return tuple(_describe_site(path, site) for path, site in self.sites.items()), self.stacks

    @functools.cached_property
    def nbytes(self) -> int:
        """The size of the memory in bytes."""
        return sum(stack.nbytes for stack, _ in self.stacks)

    def split(self, memory: Tensor) -> list[Tensor]:
        """View memory as the stacks."""
        parts = memory.split([stack.nbytes for stack, _ in self.stacks])
        return [stack.view(part) for (stack, _), part in zip(self.stacks, parts, strict=True)]

    def view(self, memory: Tensor) -> dict[str, Tensor]:
        """View memory as tensors by slot."""
        return {
            name: tensor
            for (_, names), stack in zip(self.stacks, self.split(memory), strict=True)
            for name, tensor in zip(names, stack.unbind(), strict=True)
        }


class AdapterStructure(ABC):
    """The structure of adapters whose files have equal headers: they differ in values only."""

    @abstractmethod
    def make_adapter(self, name: str, values: Tensor) -> Adapter:
        """Return an adapter whose tensors are views of values, which have the order of its file."""


class StoredAdapter(ABC):
    """An adapter on disk, which is read when it is used; a pool may have thousands.

    Attributes:
        nbytes: the size of its tensors on disk.
        invocation: the token ids from which on the adapter acts; empty: it acts on every token.
    """

    __slots__ = ("invocation", "nbytes")
    nbytes: int
    invocation: tuple[int, ...]

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder of the adapter."""

    @property
    @abstractmethod
    def structure(self) -> AdapterStructure | None:
        """The structure of the adapter; None if its values are not read without its format."""

    @abstractmethod
    def read_values(self, structure: AdapterStructure) -> Tensor | None:
        """Read and check the values of the adapter; return None if it has another structure by now.

        Raises:
            FormatError, AdapterError: the adapter was changed since it was registered.
        """

    @abstractmethod
    def read(self, name: str) -> Adapter:
        """Read the adapter and check it strictly against the model.

        Raises:
            FormatError, AdapterError, SiteError: the adapter was changed since it was registered.
        """


def _describe_site(path: str, site: ComposedSite) -> tuple[object, ...]:
    return path, site.roles, site.reasons, tuple((strength, term.slot) for strength, term in site.branches)
