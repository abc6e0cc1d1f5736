"""PEFT type WAVEFT.

Source: peft.tuners.waveft of PEFT 0.21. With proportional_parameters, n_frequency is a mean, and each module gets a
share according to its size, which its tensor in the file shows. lorac writes these numbers as n_frequency_pattern.
"""

import dataclasses
import re
from collections.abc import Mapping

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, TrainingOnly, read_choice, read_flag
from lorac.formats.peft.fields import bias
from lorac.formats.peft.peft_type import Tensors
from lorac.formats.peft.transformed_type import TransformedType, transformed_fields
from lorac.variants.waveft import WAVELETS, WaveFT


class WaveftType(TransformedType[WaveFT]):
    """WAVEFT."""

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

    def refine_variant(self, variant: WaveFT, values: JsonMapping, stored: Mapping[str, Tensors]) -> WaveFT:
        if not values["proportional_parameters"]:
            return variant
        sizes = {path: tensors[self.suffixes[0]].numel() for path, tensors in stored.items()}
        longest_first = sorted(sizes, key=len, reverse=True)  # the pattern "b" also matches "a.b"
        return dataclasses.replace(
            variant, n_frequency_pattern={re.escape(path): sizes[path] for path in longest_first}
        )
