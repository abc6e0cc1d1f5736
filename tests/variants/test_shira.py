"""SHiRA by hand, and against PEFT."""

import pytest
import torch
from peft import ShiraConfig
from torch import nn

import lorac
from lorac.ir.algebra.changes import Sparse, SparseSum, add_sparse
from lorac.testing import assert_close
from tests import parity, peft_files
from tests.refusing import refuses


class Host(nn.Module):
    def __init__(self, out, columns):
        super().__init__()
        self.site = nn.Linear(columns, out, dtype=torch.float64)

    def forward(self, x):
        return self.site(x)


def linear(out, columns):
    return Host(out, columns).eval()


def filled(compiled, seed=0):
    """The compiled adapter with its values away from zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = compiled.adapters["a"].tensors["site"]
    with torch.no_grad():
        tensors["values"].normal_(0, 0.3, generator=generator)
    return tensors


@torch.no_grad()
def test_changes_only_its_positions():
    model, columns_of_weight = linear(11, 7), torch.eye(7, dtype=torch.float64)
    compiled = lorac.compile(model, {"a": lorac.SHiRA(r=2, targets=("site",))}, mode="fused")
    tensors = filled(compiled)
    compiled.swap(None)
    compiled.swap("a")
    changed = (compiled(columns_of_weight) != model(columns_of_weight)).t().nonzero()
    rows, columns = tensors["indices"]
    assert tensors["indices"].shape == (2, 2 * (11 + 7))
    assert set(map(tuple, changed.tolist())) == set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert len(changed) == 36
    compiled.swap(None)
    assert torch.equal(compiled(columns_of_weight), model(columns_of_weight))


@torch.no_grad()
def test_strength_zero_is_the_base():
    model, x = linear(11, 7), torch.randn(4, 7, dtype=torch.float64)
    compiled = lorac.compile(model, {"a": lorac.SHiRA(r=2, targets=("site",))})
    filled(compiled)
    assert not torch.equal(compiled(x), model(x))
    assert torch.equal(compiled(x, adapters={"a": 0.0}), model(x))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_overlapping_terms_add(order):
    """Base ones(4); idx [0, 2], v [.5, −1], strength 1; idx [2, 3], v [2, 4], strength .5."""

    def sparse(columns, values):
        columns = torch.tensor(columns)
        return Sparse(torch.zeros_like(columns), columns, torch.tensor(values))

    terms = [(1.0, sparse([0, 2], [0.5, -1.0])), (0.5, sparse([2, 3], [2.0, 4.0]))]
    value = SparseSum(tuple(terms[i] for i in order))
    assert add_sparse(torch.ones(1, 4), value.terms).tolist() == [[1.5, 1.0, 1.0, 3.0]]


def test_gradient_is_the_dense_gradient_at_the_positions():
    model, x = linear(11, 7), torch.randn(5, 7, dtype=torch.float64)
    compiled = lorac.compile(model, {"a": lorac.SHiRA(r=2, targets=("site",))})
    tensors, upstream = filled(compiled), torch.randn(5, 11, dtype=torch.float64)
    compiled(x).backward(upstream)
    dense = upstream.t() @ x
    assert_close(tensors["values"].grad, dense[tuple(tensors["indices"])])


def test_rejects_more_positions_than_entries():
    with refuses("site_unsupported", match="36 positions of 'site', which has 35"):
        lorac.compile(linear(5, 7), {"a": lorac.SHiRA(r=3, targets=("site",))})


@torch.no_grad()
def test_peft(tmp_path):
    model, x = linear(11, 7), torch.randn(3, 4, 7, dtype=torch.float64)
    config = ShiraConfig(r=2, target_modules=["site"], random_seed=3)
    oracle = peft_files.make_peft(model, tmp_path, config, inputs={"x": x})
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, [tmp_path], mode=mode)
        assert compiled.adapters[tmp_path.name].numel() == 3 * 2 * (11 + 7)
        parity.assert_parity(compiled(x), oracle(x), model(x))
