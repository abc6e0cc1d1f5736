"""The public conformance kit: the checks that every variant and backend must pass.

    import pytest
    from lorac.testing import conformance

    @pytest.mark.parametrize("check", conformance(MyVariant, oracle=my_oracle), ids=str)
    def test_my_variant(check):
        check()

A check is a callable that raises ``AssertionError``, for any test runner. Backends pass their name in ``targets=``.
"""

from lorac.testing.case import Case, Oracle
from lorac.testing.conformance import Check, conformance
from lorac.testing.hosts import HOSTS
from lorac.testing.hosts import ConformanceHost as Host
from lorac.testing.parity import CONTRIBUTION, FLOAT32, FLOAT64, assert_close, assert_parity, contribution
from lorac.testing.samples import adapter_away, samples

__all__ = [
    "CONTRIBUTION",
    "FLOAT32",
    "FLOAT64",
    "HOSTS",
    "Case",
    "Check",
    "Host",
    "Oracle",
    "adapter_away",
    "assert_close",
    "assert_parity",
    "conformance",
    "contribution",
    "samples",
]
