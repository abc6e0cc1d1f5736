"""The deciding measure, from the public kit, under the name the tests use."""

from lorac.testing import CONTRIBUTION, FLOAT32, FLOAT64, assert_parity, contribution
from lorac.testing.parity import named_outputs

__all__ = ["CONTRIBUTION", "FLOAT32", "FLOAT64", "assert_parity", "contribution", "named_outputs"]
