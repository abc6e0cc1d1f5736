"""PEFT type FOURIERFT.

Source: peft.tuners.fourierft of PEFT 0.21. PEFT transforms in float32, for any dtype of the model.
"""

from lorac.formats._config_fields import TrainingOnly
from lorac.formats.peft.fields import bias
from lorac.formats.peft.transformed_type import TransformedType, transformed_fields
from lorac.variants.fourierft import FourierFT


class FourierftType(TransformedType[FourierFT]):
    """FOURIERFT."""

    peft_type = "FOURIERFT"
    variants = {FourierFT: {}}
    fields = {**transformed_fields(1000, 150.0), "bias": bias("fourier"), "init_weights": TrainingOnly(False)}
    suffixes = ("fourierft_spectrum",)
