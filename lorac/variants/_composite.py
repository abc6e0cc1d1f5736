"""Methods that combine other weight methods; each inner method's tensors have a prefix."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from lorac.variants.base import Init, InitContext, Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.params import select_params


class CompositeVariant(WeightVariant):
    """A method that combines other methods."""

    @property
    @abstractmethod
    def inner(self) -> Mapping[str, WeightVariant]:
        """Prefix of an inner method's tensors -> the inner method."""

    @abstractmethod
    def inner_sites(self, site: Site) -> Mapping[str, Site]:
        """Return prefix -> the site as the inner method sees it, for the inner methods that act at a site, in order.

        Raises:
            SiteError: an inner method cannot act at the site.
        """

    @abstractmethod
    def inner_weight(self, prefix: str, context: InitContext) -> Tensor:
        """Return the weight that an inner method's initialisers may read."""

    def check(self, site: Site) -> None:
        super().check(site)
        for prefix, place in self.inner_sites(site).items():
            self.inner[prefix].check(place)

    def starts_as_base(self, site: Site) -> bool:
        return all(self.inner[prefix].starts_as_base(place) for prefix, place in self.inner_sites(site).items())

    def params(self, site: Site) -> dict[str, ParamSpec]:

        def initialise(context: InitContext, prefix: str, place: Site, init: Init) -> Tensor:
            """Call an inner method's initialiser, which sees only its own tensors and weight."""
            own = select_params(context.params, prefix)
            return init(replace(context, site=place, params=own, weight=partial(self.inner_weight, prefix, context)))

        return {
            prefix + key: replace(spec, init=partial(initialise, prefix=prefix, place=place, init=spec.init))
            for prefix, place in self.inner_sites(site).items()
            for key, spec in self.inner[prefix].params(place).items()
        }

    def constrained(self, p: Params) -> dict[str, Tensor]:
        return {
            prefix + key: tensor
            for prefix, method in self.inner.items()
            for key, tensor in method.constrained(select_params(p, prefix)).items()
        }
