"""The base class of VERA and RANDLORA, whose modules share random tensors drawn from a seed."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.errors import BaseNeeded
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import Variant

V = TypeVar("V", bound=Variant)


class SeededType(PeftType[V]):
    """A PEFT type of linear layers, which share random tensors.

    Attributes:
        axes: shared tensors and those of one module, by suffix -> their number of axes.
        expected: their shapes, as the next step of an error.
    """

    kinds = frozenset({SiteKind.LINEAR})
    conv1d = True
    axes: ClassVar[dict[str, int]]
    expected: ClassVar[str]

    @abstractmethod
    def tell_site(self, path: str, tensors: Tensors) -> Site:
        """Return the site of a module as its tensors tell it."""

    @abstractmethod
    def draw(self, values: JsonMapping, out_features: int, in_features: int) -> Sequence[Tensor]:
        """Return the shared tensors in PEFT's values.

        Args:
            out_features: the largest of the sites.
            in_features: the largest of the sites.
        """

    def read_site(self, variant: V, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        tensors = take_tensors(path, stored, self.axes, self.expected)
        return self.tell_site(path, tensors), tensors

    def make_shared(self, values: JsonMapping, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Return the shared tensors as the seed gives them; empty where the file holds them.

        Raises:
            BaseNeeded: no site is known, so the sizes are not either.
        """
        if values["save_projection"]:
            return {}
        if not sites:
            raise BaseNeeded(
                "save_projection=False: the file lacks the tensors of its seed, and their sizes depend on the model",
                next_step="load_adapter(path, model)",
            )
        sizes = max(site.out_features for site in sites), max(site.in_features for site in sites)
        return dict(zip(self.shared, self.draw(values, *sizes), strict=True))
