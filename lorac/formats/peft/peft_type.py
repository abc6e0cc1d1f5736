"""The base class of PEFT types: a table of configuration fields, and the layout of the tensors of one module.

Every subclass in a module of ``lorac.formats.peft.types`` is registered as a type.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lorac.adapters.fresh import make_site_tensors
from lorac.argument_types import JsonMapping
from lorac.errors import AdapterError, shape_error, warn
from lorac.formats._config_fields import Field
from lorac.formats._errors import unadapted_error
from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import BaseReader, Site, SiteKind
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

Tensors = Mapping[str, Tensor]
Parameters = dict[str, Tensor]
V = TypeVar("V", bound=Variant)


class _Given:
    """A value in ``PeftType.variants`` that equals any value that is set."""

    __hash__ = None  # type: ignore[assignment]  # it equals values with any hash

    def __eq__(self, other: object) -> bool:
        return bool(other)

    def __repr__(self) -> str:
        return "{…}"


GIVEN = _Given()


class PeftType(ABC, Generic[V]):
    """A PEFT type.

    Attributes:
        former_names: names that older releases of PEFT gave to this type.
        variants: class of the method -> the configuration values that select it.
        read_only: the methods that PEFT itself does not compute, for which no file is written.
        fields: every field of PEFT's configuration class, and the fields that older releases or forks wrote.
        suffixes: the suffixes of keys, after the path of a module.
        shared: names of shared tensors, in the file and as parameters. A tensor that all modules share has the key
            ``base_model.<name>``, and in older files a copy at every module; one that a group shares has
            ``base_model.<name>.<group>``.
        kinds: the kinds of sites that PEFT's type adapts; None if ``check_site`` decides.
        conv1d: whether the type adapts GPT-2's Conv1D.
        grouped: whether the type adapts grouped convolutions.
        pads_itself: whether PEFT's forward pass pads as the convolution does, in any padding mode.
        shapes_tell_kind: whether shapes in a file determine the kind and kernel of a site.
        ordered: whether the meaning of a file depends on the order of sites in the model (``Variant.for_model``).
        names_no_site: whether a file may have no key of a module, so only the configuration's targets determine the
            sites.
        derived: parameters that no file has, since configuration and model determine them.
        needs_model: whether a file can be read only with the model, which ``complete_site`` reads.
        completed: methods for which a file can be read only with the model, where ``needs_model`` is False.
        tied: for a type that can tie the output layer to an adapted embedding: parameter of the output layer ->
            parameter of the embedding whose transpose it is.
        copied: for a type that trains whole copies of targeted modules (``Variant.replaces_module``): the part of a key
            between the module's path and the parameter's name.
        training_state: substring of a key that is training state only -> the field that accounts for it.
        start_field: the field with an adapter's initialisation, where some initialisations rewrite the base.
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
        """The type's name in the configuration; abstract in a base class of several types."""

    def read_site(self, variant: V, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        """Return the site that its tensors in a file imply, and the parameters as matrices; by default, refuse them.

        Args:
            stored: the site's tensors by suffix, and the shared tensors by name.

        Raises:
            AdapterError: the tensors do not fit each other.
        """
        raise mismatched_shapes(path, stored, f"{self.peft_type} has no tensors at single layers")

    def write_site(self, variant: V, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        """Convert the parameters of a site to a file's tensors: by suffix, and shared tensors by name.

        The result may contain parameters of ``derived``, which the caller removes.

        Raises:
            SiteError: PEFT does not adapt such a layer.
            FormatError: PEFT cannot store a parameter's values.
        """
        return dict(tensors)

    def check_site(self, site: Site, tensors: Tensors) -> None:
        """Refuse a site that PEFT's type does not adapt; warn where PEFT's result before merging differs.

        Raises:
            SiteError: the type does not adapt the site.
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
        raise unadapted_error(f"PEFT's {self.peft_type} does not adapt '{site.path}', which is {what}")

    def complete_site(self, variant: V, site: Site, tensors: Parameters, base: BaseReader) -> Parameters:
        """Add the parameters that no file has (``derived``), which a fresh adapter has with the same values."""
        return make_site_tensors(variant, variant.name, site, base, tensors)

    def read_inner(self, values: JsonMapping, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the effective parameters of a layer whose weight an enclosing adapted module reads itself."""
        return tensors

    def rename_keys(self, tensors: Tensors) -> Tensors:
        """Rename the keys of a fork's file to the keys of this type."""
        return tensors

    def name_as_fork(self, tensors: Tensors) -> Tensors:
        """Rename tensors to the keys of the fork that has a method of ``read_only``."""
        return tensors

    def refine_variant(self, variant: V, values: JsonMapping, stored: Mapping[str, Tensors]) -> Variant:
        """Correct a variant by the values of the configuration and the tensors of a file, by site and suffix."""
        return variant

    def find_tied_sites(self, stored: Mapping[str, Tensors], sites: Mapping[str, Site]) -> dict[str, str]:
        """Return tied site -> the site of the file with which PEFT shares its tensors."""
        return {}

    def check_copies(self, config: JsonMapping, sites: Iterable[Site], stored: Mapping[str, Tensors]) -> None:
        """Refuse parameters that differ from another site's if the configuration makes PEFT take the two for copies.

        Raises:
            FormatError: naming the two sites.
        """

    def draw_shared(self, values: JsonMapping, out_features: int, in_features: int) -> Sequence[Tensor]:
        """Draw the shared tensors from the seed, for a type whose files may omit them (``save_projection``).

        Args:
            out_features: the largest number of output features of any site.
            in_features: the largest number of input features of any site.
        """
        raise NotImplementedError

    def shared_shapes(self, variant: V, sites: Sequence[Site]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes of shared tensors in PEFT, where these differ from the shapes that the sites need."""
        return {}

    def undo_start(self, adapter: Adapter, values: JsonMapping, view: ModelView | None) -> Adapter:
        """Rewrite an adapter to the original base, where its initialisation rewrote the base."""
        return adapter

    def convert(self, adapter: Adapter) -> Adapter | None:
        """Convert an adapter whose method has no PEFT type to an equal one of this type; None where it cannot."""
        return None

    def read_folder(
        self, folder: AdapterFile, values: JsonMapping, tensors: Tensors, name: str, view: ModelView | None
    ) -> Adapter | None:
        """Read the adapter of a type whose file has no tensors of modules; None for all other types."""
        return None

    def write_folder(self, adapter: Adapter, view: ModelView | None) -> tuple[Tensors, Mapping[str, Adapter]] | None:
        """Return the file's tensors, and the experts by name, for a type as in ``read_folder``; None for all others."""
        return None

    def tied_tensors(self, embedding: Tensors) -> dict[str, Tensor]:
        """Return the parameters of an output layer tied to an embedding with the given ones; empty for other types.

        PEFT adapts an lm_head that ensure_weight_tying ties to an embedding with A (r, V) and B (d, r) by Bᵀ and Aᵀ,
        and saves both layers' tensors (peft.tuners.lora.model).
        """
        if not embedding.keys() >= set(self.tied.values()):
            return {}
        return {own: embedding[other].t() for own, other in self.tied.items()}

    def holds_tied(self, own: Tensors, embedding: Tensors) -> bool:
        """Return whether a layer has exactly the tensors that tying it to an embedding gives."""
        tied = self.tied_tensors(embedding)
        return bool(tied) and contains_tensors(own, tied)


def contains_tensors(tensors: Tensors, expected: Tensors) -> bool:
    """Return whether tensors contain all the expected ones, by name and with equal values."""
    return all(name in tensors and torch.equal(tensors[name], tensor) for name, tensor in expected.items())


AnyPeftType = PeftType[Any]
"""A PEFT type of whatever variant."""


def warn_of_padding(peft_type: str, site: Site) -> None:
    """Warn of a convolution with a padding mode other than zeros, since PEFT pads its added branch with zeros.

    An adapter that PEFT merged gives lorac's result; an unmerged one differs at the borders.
    """
    if site.conv is None or not site.conv.before or site.conv.mode == "zeros":
        return
    warn(
        f"'{site.path}' pads by '{site.conv.mode}', and PEFT's {peft_type} pads with zeros until it is merged: lorac "
        "computes with the merged weight, at the borders too",
        next_step="add the module to exclude= where its borders must be those of PEFT's unmerged adapter",
    )


def take_tensors(path: str, stored: Tensors, axes: Mapping[str, int], expected: str) -> dict[str, Tensor]:
    """Return the tensors of one module, in the order of ``axes``: name -> number of axes.

    Raises:
        AdapterError: a tensor is missing or additional, or has another number of axes.
    """
    if {name: tensor.ndim for name, tensor in stored.items()} != axes:
        raise mismatched_shapes(path, stored, expected)
    return {name: stored[name] for name in axes}


def mismatched_shapes(path: str, stored: Tensors, expected: str) -> AdapterError:
    """Return the error for tensors of one module that do not fit each other."""
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in stored.items())
    return shape_error(f"the tensors at '{path}' do not belong together: {shapes}", next_step=expected)


Pair = tuple[str, str]
"""Suffixes of A and B."""


def read_factors(
    path: str, stored: Tensors, matrices: Pair, embedding: Pair, expected: str
) -> tuple[Site, Tensor, Tensor]:
    """Return the site that the shapes of A and B imply, A (r, in) and B (out, r / groups), with kernels flattened.

    In a file, A of a convolution is a kernel (r, in, …), and B is (out, r / groups, 1, …).

    Args:
        stored: the tensors of the file, by suffix.
        matrices: the suffixes of A and B at a linear layer or convolution.
        embedding: the suffixes of A and B at an embedding.

    Raises:
        AdapterError: the shapes do not fit each other, or fit no kind of site.
    """
    pair = embedding if embedding[0] in stored else matrices
    if any(name not in stored or stored[name].ndim < 2 for name in pair):
        raise mismatched_shapes(path, stored, expected)
    a, b = (stored[name] for name in pair)
    groups = a.shape[0] // b.shape[1] if b.shape[1] else 0
    divides = bool(groups) and b.shape[1] * groups == a.shape[0] and b.shape[0] % groups == 0
    if not divides or not a.ndim == b.ndim <= 5 or prod(b.shape[2:]) != 1 or (groups > 1 and a.ndim == 2):
        raise mismatched_shapes(path, stored, expected)
    if a.ndim == 2:
        kind = SiteKind.EMBEDDING if pair is embedding else SiteKind.LINEAR
        return matrix_site(path, b.shape[0], a.shape[1], kind), a, b
    site = conv_site(path, b.shape[0], a.shape[1], tuple(a.shape[2:]), groups)
    return site, a.flatten(1), b.flatten(1)


def write_factors(site: Site, a: Tensor, b: Tensor, matrices: Pair, embedding: Pair) -> dict[str, Tensor]:
    """Return A and B in the shapes that a file has; the inverse of ``read_factors``."""
    if site.conv is not None:
        ones = (1,) * len(site.conv.kernel)
        a, b = a.reshape(-1, *site.kernel[1:]), b.reshape(b.shape[0], -1, *ones)
    return dict(zip(embedding if site.kind is SiteKind.EMBEDDING else matrices, (a, b), strict=True))


def core_shape(site: Site, core: Tensor) -> Sequence[int]:
    """Return the shape (r, r, kh, kw) that a file has for a core (r, r, taps); a Conv1d's kernel counts as (k, 1)."""
    assert site.conv is not None
    return (*core.shape[:2], *(*site.conv.kernel, 1)[:2])


class PlainType(PeftType[V]):
    """A type whose parameters are a file's tensors unchanged, besides those of ``derived``.

    Where a file has a tensor for the bias, the layer has a bias.

    Attributes:
        names: suffix -> parameter, where that is not the suffix with underscores for dots.
        sizes: the tensor and its axis that show a layer's output features, and those that show its input features;
            None where no tensor shows them.
    """

    names: ClassVar[Mapping[str, str]] = {}
    sizes: ClassVar[tuple[tuple[str, int] | None, tuple[str, int] | None]] = (None, None)

    def measure(self, variant: V, stored: Tensors) -> tuple[int, int]:
        """Return a layer's output and input features by its tensors; 1 where these do not tell."""
        rows, columns = (stored[at[0]].shape[at[1]] if at and at[0] in stored else 1 for at in self.sizes)
        return rows, columns

    def read_site(self, variant: V, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        smallest, here = matrix_site(path, 1, 1), variant.at_path(path)
        every = (here.params(replace(smallest, bias=bias)) for bias in (None, "bias"))
        needed, specs = ({name: own[name] for name in own if name not in self.derived} for own in every)
        tensors = {self._parameter(suffix): tensor for suffix, tensor in stored.items()}
        is_complete = needed.keys() <= tensors.keys() <= specs.keys()
        if not is_complete or any(tensor.ndim != len(specs[name].shape) for name, tensor in tensors.items()):
            expected = ", ".join(f"{name} has {len(spec.shape)} axes" for name, spec in specs.items())
            raise mismatched_shapes(path, stored, expected)
        site = matrix_site(path, *self.measure(variant, stored))
        return replace(site, bias=None if tensors.keys() <= needed.keys() else f"{path}.bias"), tensors

    def write_site(self, variant: V, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        names = {suffix: self._parameter(suffix) for suffix in (*self.shared, *self.suffixes)}
        return {suffix: tensors[name] for suffix, name in names.items() if name in tensors}

    def _parameter(self, suffix: str) -> str:
        return self.names.get(suffix, suffix.removesuffix(".weight").replace(".", "_"))
