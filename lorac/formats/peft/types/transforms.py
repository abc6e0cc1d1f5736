"""PEFT types FOURIERFT and WAVEFT: values of a transform at positions that a seed in the configuration determines."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Generic, TypeVar

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import (
    Applied,
    Field,
    TrainingOnly,
    read_choice,
    read_flag,
    read_int,
    read_number,
    read_rank_pattern,
    read_size,
    write_number_pattern,
)
from lorac.formats.peft.fields import COMMON, FILTERS, bias
from lorac.formats.peft.peft_type import PlainType, Tensors
from lorac.variants.fourierft import WAVELETS, FourierFT, TransformedVariant, WaveFT

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


class TransformedType(PlainType[T], Generic[T]):
    """A type that stores one tensor per module, the trained values (n,).

    The values belong to the first n positions of a permutation of out·in positions, drawn from random_loc_seed.
    """

    conv1d = True
    needs_model = True
    derived = ("indices",)


class FourierftType(TransformedType[FourierFT]):
    """FOURIERFT.

    Source: peft.tuners.fourierft of PEFT 0.21. PEFT transforms in float32, for any dtype of the model.
    """

    peft_type = "FOURIERFT"
    variants = {FourierFT: {}}
    fields = {**transformed_fields(1000, 150.0), "bias": bias("fourier"), "init_weights": TrainingOnly(False)}
    suffixes = ("fourierft_spectrum",)
    sizes = None, ("fourierft_spectrum", 0)


class WaveftType(TransformedType[WaveFT]):
    """WAVEFT.

    Source: peft.tuners.waveft of PEFT 0.21. With proportional_parameters, n_frequency is a mean, and each module gets a
    share according to its size, which its tensor in the file shows. lorac writes these numbers as n_frequency_pattern.
    """

    peft_type = "WAVEFT"
    variants = {WaveFT: {}}
    fields = {
        **transformed_fields(2592, 25.0),
        "wavelet_family": Applied("db1", to="wavelet_family", read=read_choice(*WAVELETS)),
        "use_idwt": Applied(True, to="use_idwt", read=read_flag),
        "proportional_parameters": Applied(False, read=read_flag),
        "bias": bias("waveft"),
        "init_weights": TrainingOnly(True),
    }
    suffixes = ("waveft_spectrum",)
    sizes = None, ("waveft_spectrum", 0)

    def refine_variant(self, variant: WaveFT, values: JsonMapping, stored: Mapping[str, Tensors]) -> WaveFT:
        if not values["proportional_parameters"]:
            return variant
        sizes = {path: tensors[self.suffixes[0]].numel() for path, tensors in stored.items()}
        longest_first = sorted(sizes, key=len, reverse=True)  # the pattern "b" also matches "a.b"
        return dataclasses.replace(
            variant, n_frequency_pattern={re.escape(path): sizes[path] for path in longest_first}
        )
