"""PEFT types that store values of a transform without positions, which a seed in the configuration determines."""

from typing import Generic, TypeVar

from torch import Tensor

from lorac.formats._config_fields import (
    Applied,
    Field,
    read_int,
    read_number,
    read_rank_pattern,
    read_size,
    write_number_pattern,
)
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, FILTERS
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites.site import Site
from lorac.variants._transformed import TransformedVariant

T = TypeVar("T", bound=TransformedVariant)


def transformed_fields(n_frequency: int, scaling: float) -> dict[str, Field]:
    """Return the fields that these types share, with the given defaults."""
    return {
        **COMMON,
        **FILTERS,
        "n_frequency": Applied(n_frequency, to="n_frequency", read=read_size),
        "scaling": Applied(scaling, to="scaling", read=read_number),
        "random_loc_seed": Applied(777, to="random_loc_seed", read=read_int),
        "n_frequency_pattern": Applied(
            {}, to="n_frequency_pattern", read=read_rank_pattern, write=write_number_pattern
        ),
    }


class TransformedType(PeftType[T], Generic[T]):
    """A type that stores one tensor per module, the trained values (n,).

    The values belong to the first n positions of a permutation of out·in positions, drawn from random_loc_seed.
    """

    conv1d = True
    needs_model = True
    derived = ("indices",)

    def read_site(self, variant: T, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        (spectrum,) = self.suffixes
        tensors = take_tensors(path, stored, {spectrum: 1}, f"{spectrum} is (n_frequency,)")
        return matrix_site(path, 1, tensors[spectrum].numel()), tensors
