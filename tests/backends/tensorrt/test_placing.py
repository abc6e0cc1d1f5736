"""Memory that plans read: what is put there, once, and what is left where it is."""

from __future__ import annotations

import pytest
import torch

from lorac.backends.tensorrt.placing import Placing, _tensors
from lorac.ir.algebra.changes import Change, Dense, LowRank, Sparse, SparseSum
from lorac.ir.host.sites import BaseReader

HERE, ELSEWHERE = torch.device("cpu"), torch.device("meta")
_SPARSE = Sparse(torch.tensor([0, 2]), torch.tensor([1, 1]), torch.randn(2), torch.randn(5))
CHANGES: list[Change] = [
    LowRank(torch.randn(4, 2), torch.randn(2, 5), {"c": torch.randn(5)}, torch.randn(5)),
    LowRank(torch.randn(4, 2), torch.randn(2, 5)),
    _SPARSE,
    SparseSum(((0.5, _SPARSE), (2.0, Sparse(_SPARSE.rows, _SPARSE.cols, _SPARSE.values))), torch.randn(5)),
    Dense(torch.randn(5, 4), torch.randn(5)),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: type(change).__name__)
def test_a_change_is_put_there_whole_and_once(change):
    placing = Placing(ELSEWHERE)
    there = placing.change(change)
    assert type(there) is type(change)
    before, after = list(_tensors(change)), list(_tensors(there))
    assert [t.shape for t in before] == [t.shape for t in after] and {t.device for t in after} == {ELSEWHERE}
    assert placing.change(change) is there  # what knows a change by itself, as a buffer does, knows its copy
    assert Placing(HERE).change(change) is change


def test_what_lies_there_is_not_copied():
    placing, tensor = Placing(HERE), torch.randn(3, 4)
    assert placing.placed(tensor).data_ptr() == tensor.data_ptr()
    turned = tensor.t()
    assert placing.placed(turned).is_contiguous() and placing.placed(turned) is placing.placed(turned)


def test_base_weights_are_read_there():
    base = Placing(ELSEWHERE).base(BaseReader(lambda site: torch.ones(2, 3), lambda site: None))
    site: object = None
    assert base.weight(site).device == ELSEWHERE and base.bias(site) is None  # type: ignore[arg-type]  # not asked for
