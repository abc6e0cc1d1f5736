"""Methods made of others that edit weights, whose tensors have a prefix each."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from lorac.variants.base import Init, InitContext, Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.params import select_params


class CompositeVariant(WeightVariant):
    """A method made of others."""

    @property
    @abstractmethod
    def inner(self) -> Mapping[str, WeightVariant]:
        """Prefix of a method's tensors -> the method."""

    @abstractmethod
    def inner_sites(self, site: Site) -> Mapping[str, Site]:
        """Return prefix -> the site as the method sees it, of the methods that act at a site, in order.

        Raises:
            SiteError: the site has no place for one of them.
        """

    @abstractmethod
    def inner_weight(self, prefix: str, context: InitContext) -> Tensor:
        """Return the weight that the start values of a method may read."""

    def check(self, site: Site) -> None:
        super().check(site)
        for prefix, place in self.inner_sites(site).items():
            self.inner[prefix].check(place)

    def starts_as_base(self, site: Site) -> bool:
        return all(self.inner[prefix].starts_as_base(place) for prefix, place in self.inner_sites(site).items())

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            prefix + key: replace(spec, init=self._inner_init(prefix, place, spec.init))
            for prefix, place in self.inner_sites(site).items()
            for key, spec in self.inner[prefix].params(place).items()
        }

    def constrained(self, p: Params) -> dict[str, Tensor]:
        return {
            prefix + key: tensor
            for prefix, method in self.inner.items()
            for key, tensor in method.constrained(select_params(p, prefix)).items()
        }

    def _inner_init(self, prefix: str, place: Site, init: Init) -> Init:
        """Return a method's initialiser, which reads its own tensors and its own weight."""

        def initialise(context: InitContext) -> Tensor:
            own = select_params(context.params, prefix)
            return init(replace(context, site=place, params=own, weight=partial(self.inner_weight, prefix, context)))

        return initialise
