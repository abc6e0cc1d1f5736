"""The base class of PEFT types: a table of configuration fields, and the layout of the tensors of one module.

A type is a subclass in a module of ``lorac.formats.peft.types``, found by its existence.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lorac.adapters.fresh import make_site_tensors
from lorac.argument_types import JsonMapping
from lorac.errors import AdapterError, SiteError, warn
from lorac.formats._config_fields import Field
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import BaseReader, Site, SiteKind
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

Tensors = Mapping[str, Tensor]
V = TypeVar("V", bound=Variant)


class _Given:
    """A value in ``PeftType.variants`` that equals each one that is set."""

    __hash__ = None  # type: ignore[assignment]  # it equals values of any hash

    def __eq__(self, other: object) -> bool:
        return bool(other)

    def __repr__(self) -> str:
        return "{…}"


GIVEN = _Given()


class PeftType(ABC, Generic[V]):
    """A PEFT type.

    Attributes:
        former_names: names of types of older releases of PEFT whose files are of this one.
        variants: class of the method -> the configuration values that select it.
        read_only: those of the classes that PEFT itself does not compute, so that none is written for it.
        fields: every field of PEFT's configuration class, and those that older releases or forks wrote.
        suffixes: the ends of keys, behind the path of a module.
        shared: names of tensors that all modules share, in the file and as parameters: ``base_model.<name>``, and in
            older files once more at every module; or that groups of modules share, ``base_model.<name>.<group>``.
        kinds: kinds of site that PEFT's type adapts; None: ``check_site`` decides.
        conv1d: whether GPT-2's Conv1D is among them.
        grouped: whether convolutions of several groups are.
        pads_itself: whether PEFT's forward pass pads as the convolution does, by whatever mode.
        shapes_tell_kind: whether the shapes in a file tell the kind and kernel of a site.
        ordered: whether the order of its sites in the model tells what a file means (``Variant.for_model``).
        names_no_site: whether a file may name no module, since the configuration's targets are all that it tells.
        derived: parameters that no file holds, since configuration and model tell them.
        needs_model: whether a file means nothing without the model, which ``complete_site`` reads.
        completed: those of the classes for which alone that holds.
        tied: of a type that can tie the output layer to the embedding that it adapts: parameter of the former -> the
            parameter of the latter whose transpose it is.
        copied: the part of a key between the path of a module and its parameter's name, of a type that trains whole
            copies of the targeted modules (``Variant.replaces_module``).
        training_state: mark in a key -> field that accounts for it: state of the training alone.
        start_field: the field that says how an adapter was initialised, where some ways rewrite the base.
    """

    former_names: ClassVar[tuple[str, ...]] = ()
    variants: ClassVar[Mapping[type[Variant], JsonMapping]]
    fields: ClassVar[Mapping[str, Field]]
    read_only: ClassVar[frozenset[type[Variant]]] = frozenset()
    suffixes: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[frozenset[SiteKind] | None] = frozenset({SiteKind.LINEAR})
    conv1d: ClassVar[bool] = False
    grouped: ClassVar[bool] = False
    pads_itself: ClassVar[bool] = False
    shapes_tell_kind: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    names_no_site: ClassVar[bool] = False
    derived: ClassVar[tuple[str, ...]] = ()
    needs_model: ClassVar[bool] = False
    completed: ClassVar[frozenset[type[Variant]]] = frozenset()
    tied: ClassVar[Mapping[str, str]] = {}
    copied: ClassVar[str | None] = None
    training_state: ClassVar[Mapping[str, str]] = {}
    start_field: ClassVar[str | None] = None

    @property
    @abstractmethod
    def peft_type(self) -> str:
        """The name in the configuration; abstract in a class that several types share."""

    @abstractmethod
    def read_site(self, variant: V, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return a site as its tensors in a file tell it, and the parameters as matrices.

        Args:
            stored: the tensors by suffix, and the shared ones by name.

        Raises:
            AdapterError: the tensors do not belong together.
        """

    def write_site(self, variant: V, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        """Return the parameters of one site as a file has them: by suffix, the shared ones by name.

        Those of ``derived`` may be among them; no file gets them.

        Raises:
            SiteError: PEFT has no such layer.
            FormatError: PEFT has no place for a parameter's values.
        """
        return dict(tensors)

    def check_site(self, site: Site, tensors: Tensors) -> None:
        """Refuse a site that PEFT's type does not adapt; warn where PEFT computes something that no weight does.

        Raises:
            SiteError: the type does not adapt it.
        """
        if self.kinds is None:
            return
        groups = site.conv.groups if site.conv else 1
        fits_layer = site.kind in self.kinds and (self.conv1d or not site.transposed)
        if fits_layer and site.within is None and (self.grouped or groups == 1):
            if not self.pads_itself:
                warn_of_padding(self.peft_type, site)
            return
        what = f"of kind {site.kind}" + (f" with {groups} groups" if groups > 1 else "")
        if site.within is not None:
            what = f"a weight within '{site.within}'"
        elif site.transposed:
            what = "GPT-2's Conv1D"
        raise SiteError(
            f"PEFT's {self.peft_type} does not adapt '{site.path}', which is {what}",
            next_step="use format='native', or exclude= the module",
        )

    def complete_site(self, variant: V, site: Site, tensors: dict[str, Tensor], base: BaseReader) -> dict[str, Tensor]:
        """Return the parameters with those that no file holds (``derived``): a fresh adapter's are the same."""
        return make_site_tensors(variant, variant.name, site, base, tensors)

    def read_inner(self, values: JsonMapping, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the effective parameters of a layer that PEFT adapts with the module that reads its weight."""
        return tensors

    def rename_keys(self, tensors: Tensors) -> Tensors:
        """Return the tensors of a file by the keys of this type, where forks wrote others."""
        return tensors

    def name_as_fork(self, tensors: Tensors) -> Tensors:
        """Return the tensors by the keys that the fork writes which has a method of ``read_only``."""
        return tensors

    def refine_variant(self, variant: V, values: JsonMapping, stored: Mapping[str, Tensors]) -> Variant:
        """Return the variant corrected by the configuration's values and the tensors of a file, by site and suffix."""
        return variant

    def find_tied_sites(self, stored: Mapping[str, Tensors], sites: Mapping[str, Site]) -> dict[str, str]:
        """Return tied site -> the site of the file whose tensors it has in PEFT."""
        return {}

    def check_copies(self, config: JsonMapping, sites: Iterable[Site], stored: Mapping[str, Tensors]) -> None:
        """Refuse parameters that PEFT, reading a configuration, would take for copies of other sites', and differ.

        Raises:
            FormatError: naming the sites.
        """

    def draw_shared(self, values: JsonMapping, out_features: int, in_features: int) -> Sequence[Tensor]:
        """Return the shared tensors as a seed gives them, of a type whose files may lack them (``save_projection``).

        Args:
            out_features: the largest of the sites.
            in_features: the largest of the sites.
        """
        raise NotImplementedError

    def shared_shapes(self, variant: V, sites: Sequence[Site]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of the shared tensors in PEFT, where they are not those that the sites need."""
        return {}

    def undo_start(self, adapter: Adapter, values: JsonMapping, view: ModelView | None) -> Adapter:
        """Return an adapter over the base as it was before the adapter's initialisation rewrote it."""
        return adapter

    def convert(self, adapter: Adapter) -> Adapter | None:
        """Return an adapter of a method without a PEFT type as an equal one of this type; None: it is of no concern."""
        return None

    def read_folder(
        self, folder: AdapterFile, values: JsonMapping, tensors: Tensors, name: str, view: ModelView | None
    ) -> Adapter | None:
        """Return the adapter of a type whose file holds no tensors of modules; None for all others."""
        return None

    def write_folder(self, adapter: Adapter, view: ModelView | None) -> tuple[Tensors, Mapping[str, Adapter]] | None:
        """Return the tensors of the file of such a type, and its experts by name; None for all others."""
        return None

    def tied_tensors(self, embedding: Tensors) -> dict[str, Tensor]:
        """Return the parameters of an output layer tied to an embedding with these; empty where the type ties none.

        PEFT adapts an lm_head that ensure_weight_tying ties to an embedding with A (r, V) and B (d, r) by Bᵀ and Aᵀ,
        and saves both (peft.tuners.lora.model).
        """
        if not embedding.keys() >= set(self.tied.values()):
            return {}
        return {own: embedding[other].t() for own, other in self.tied.items()}

    def holds_tied(self, own: Tensors, embedding: Tensors) -> bool:
        """Return whether a layer that is tied to an embedding has its tensors, value for value."""
        tied = self.tied_tensors(embedding)
        return bool(tied) and contains_tensors(own, tied)


def contains_tensors(tensors: Tensors, expected: Tensors) -> bool:
    """Return whether the expected tensors are among others, value for value."""
    return all(name in tensors and torch.equal(tensors[name], tensor) for name, tensor in expected.items())


AnyPeftType = PeftType[Any]
"""A PEFT type of whatever variant."""


def warn_of_padding(peft_type: str, site: Site) -> None:
    """Warn of a convolution that pads otherwise than with zeros, as PEFT pads the branch that it adds.

    Merged by PEFT the adapter is the same as here; unmerged, PEFT computes something else at the borders.
    """
    if site.conv is None or not site.conv.before or site.conv.mode == "zeros":
        return
    warn(
        f"'{site.path}' pads by '{site.conv.mode}', where PEFT's {peft_type} pads with zeros until it is merged: "
        "what is computed here is the merged weight's, everywhere",
        next_step="exclude= the module where its borders must be those of PEFT's unmerged adapter",
    )


def take_tensors(path: str, stored: Tensors, axes: Mapping[str, int], expected: str) -> dict[str, Tensor]:
    """Return the tensors of one module in the order of ``axes``, which maps each name to its number of axes.

    Raises:
        AdapterError: there are others, or one has another number of axes.
    """
    if {name: tensor.ndim for name, tensor in stored.items()} != axes:
        raise mismatched_shapes(path, stored, expected)
    return {name: stored[name] for name in axes}


def mismatched_shapes(path: str, stored: Tensors, expected: str) -> AdapterError:
    """Return the error for tensors of one module that make no adapter of it."""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in stored.items())
    return AdapterError(
        f"the tensors at '{path}' do not belong together: {shapes}", next_step=expected, code="shape_mismatch"
    )
