"""Base classes of initialisers.

An initialiser is a frozen dataclass of its settings, called with an adapter and its model. It returns a new adapter and
leaves its arguments unchanged, also when it fails.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, ClassVar

from torch import Tensor, nn

from lorac.adapters.fit import check_adapter
from lorac.adapters.fresh import make_fresh_adapter
from lorac.adapters.residual_base import FactorPair, subtract_factors
from lorac.errors import AdapterNotFound, SiteError
from lorac.frontend.base_weights import make_base_reader
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import Site, factor_dtype
from lorac.training.initialisation.activations import batches_error
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.dora import DoRA
from lorac.variants.lora import LoRA

Batches = Iterable[Any]
"""Arguments of calls: a mapping of keywords, a tuple of arguments, or one argument each."""


@dataclass(frozen=True)
class InitialisationSite:
    """A site whose factors are initialised.

    Attributes:
        variant: the adapter's method there, with the patterns applied.
        weight: W (out, in), in the dtype of the factors; of a stack (E, out, in).
        read: the values that the initialiser read there from batches, on the device of W; empty where it reads none.
    """

    variant: Any
    weight: Tensor
    read: Tensor


class Initialiser(ABC):
    """Base class of initialisers: ``adapter = initialiser(adapter, model, batches)``.

    Raises, when called:
        AdapterNotFound: the initialiser does not support the adapter's method.
        SiteError: the adapter does not fit the model, a weight is too small, or no batch reaches a site.
        AdapterError: batches are needed and missing, have no loss, or give NaN or infinity.
    """

    methods: ClassVar[tuple[type[Variant], ...]] = (LoRA, DoRA)
    """Methods that it supports."""
    reads: ClassVar[str] = ""
    """``"gradients"`` or ``"activations"``; empty where the weights are enough."""
    vectors: ClassVar[int] = 1
    """Number of singular vectors that it needs of a weight, in units of r."""

    def __call__(self, adapter: Adapter | Variant, model: nn.Module, batches: Batches | None = None) -> Adapter:
        """Return the adapter with its first values.

        Args:
            adapter: an adapter, or a fresh method such as ``lorac.LoRA(r=8)``; only read.
            model: the base that it will be trained on; left unchanged, with its buffers and the random state.
            batches: arguments of the model's calls, if gradients or activations are read.
        """
        view = ModelView.of(model)
        sites, begun = view.sites, self._check(adapter, view)
        for path in begun.tensors:
            site = sites[path]
            variant: Any = begun.variant.at(site)
            variant.check(site)
            if site.packed is not None:
                raise SiteError(
                    f"the weight of '{site.path}' is held as {site.packed}, which {type(self).__name__} cannot read",
                    next_step="initialise over the model in float, and train over the quantised one",
                )
            most = min(site.out_features, site.in_features) // self.vectors
            if variant.r > most:
                raise SiteError(
                    f"{type(self).__name__} needs {self.vectors * variant.r} singular vectors at '{site.path}' "
                    f"({site.in_features} -> {site.out_features})",
                    nearest=f"r={most}",
                    next_step="give a smaller r, or add the module to exclude=",
                )
        listed = iter(batches if self.reads and batches is not None else ())
        first = list(islice(listed, 1))
        if self.reads and not first:
            raise batches_error(
                f"{type(self).__name__} reads {self.reads}, and there are no batches",
                next_step="pass batches=, a list with the arguments of one call each",
            )
        return self.begin(begun, model, {path: sites[path] for path in begun.tensors}, chain(first, listed))

    @abstractmethod
    def begin(self, adapter: Adapter, model: nn.Module, sites: Mapping[str, Site], batches: Batches) -> Adapter:
        """Compute an adapter with its first values.

        Args:
            adapter: checked against the model.
            model: the base.
            sites: the sites that the adapter adapts.
            batches: at least one, if any are read.
        """

    def _check(self, given: Adapter | Variant, view: ModelView) -> Adapter:
        variant = given if isinstance(given, Variant) else given.variant
        if not isinstance(variant, self.methods):
            named = " or ".join(f"lorac.{method.__name__}" for method in self.methods)
            raise AdapterNotFound(
                f"{type(self).__name__} initialises adapters of {named}, and this one is of method {variant.name}",
                next_step=f"give it a {named}",
            )
        if isinstance(given, Variant):
            given = make_fresh_adapter(given, given.name, view)
        check_adapter(given, view)
        return given


class PairInitialiser(Initialiser):
    """An initialiser that computes A and B of a LoRA or DoRA, site by site."""

    residual: bool = True
    """Whether s·B·A is subtracted from the base, so that the adapter begins at the base's output."""

    def read(self, model: nn.Module, sites: Mapping[str, Site], batches: Batches) -> Mapping[str, Tensor]:
        """Return the values that ``pair`` needs from the batches, by path of a site; by default none."""
        return {}

    @abstractmethod
    def pair(self, place: InitialisationSite) -> FactorPair:
        """Return A (r, in) and B (out, r) at a site."""

    def begin(self, adapter: Adapter, model: nn.Module, sites: Mapping[str, Site], batches: Batches) -> Adapter:
        read, base = self.read(model, sites, batches), make_base_reader(model)
        pairs, tensors = {}, {}
        for path, site in sites.items():
            weight = base.weight(site).to(factor_dtype(site.dtype))
            found = read.get(path, weight.new_empty(0)).to(weight.device)
            pairs[path] = a, b = self.pair(InitialisationSite(adapter.variant.at(site), weight, found))
            tensors[path] = {**adapter.tensors[path], "lora_A": a.contiguous(), "lora_B": b.contiguous()}
        begun = replace(adapter, tensors=tensors, provenance=dict(adapter.provenance))
        return subtract_factors(begun, pairs) if self.residual else begun
