"""DEFT by hand: its projectors, the start that undoes the removal, and ranks above a layer's outputs."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import lorac
from lorac import DEFT
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, assert_close, conformance
from tests.oracles import deft as equations


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.medium("the formula, and the kit's other checks of relu", keep=["*-formula"])
@pytest.mark.parametrize(
    "check",
    conformance(
        DEFT(r=3, alpha=5.0, decomposition_method="qr"),
        equations,
        targets=(),
        hosts={"linear": HOSTS["linear"]},
    ),
    ids=str,
)
def test_orthonormal_projector_conforms(check):
    check()


def test_worked_example():
    """P = (1, −1): relu(P) = (1, 0), so that row 0 of W is taken off row 0 and added to row 1."""
    weight = tensor([[1.0, 2.0], [3.0, 4.0]])
    p = SimpleNamespace(deft_P=tensor([[1.0], [-1.0]]), deft_R=tensor([[10.0, 20.0]]))
    assert DEFT(r=1, para=True).weight(weight, p).tolist() == [[0.0, 0.0], [4.0, 6.0]]
    assert DEFT(r=1).weight(weight, p).tolist() == [[10.0, 20.0], [-6.0, -14.0]]
    assert DEFT(r=1, alpha=2).weight(weight, p).tolist() == [[20.0, 40.0], [-16.0, -34.0]]


def test_orthonormal_removal_leaves_nothing_in_the_subspace():
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left = DEFT(r=2, decomposition_method="qr", para=True).weight(weight, SimpleNamespace(deft_P=directions))
    inside = directions.t() @ weight
    assert_close(inside + directions.t() @ left, inside)


@pytest.mark.parametrize("method", ["relu", "qr"])
@torch.no_grad()
def test_starts_as_the_base_and_para_does_not(method):
    model, x = HOSTS["linear"].model(), HOSTS["linear"].inputs((5,))
    variant = DEFT(r=3, alpha=7, decomposition_method=method, targets=("site",))
    assert variant.identity_at_init
    compiled = lorac.compile(model, {"a": variant})
    assert_close(compiled(x), model(x))
    assert isinstance(compiled.pool["a"].changes["site"], LowRank)
    removing = dataclasses.replace(variant, para=True)
    assert not removing.identity_at_init
    assert set(lorac.compile(model, {"a": removing}).adapters["a"].tensors["site"]) == {"deft_P"}


def test_rank_is_at_most_the_number_of_outputs():
    """alpha is divided by the rank of the site, as in PEFT."""
    site = lorac.sites(HOSTS["linear"].model())["site"]
    specs = DEFT(r=100).params(site)
    assert specs["deft_P"].shape == (site.out_features, site.out_features)
    assert specs["deft_R"].shape == (site.out_features, site.in_features)
    p = SimpleNamespace(deft_P=torch.ones(3, 3), deft_R=torch.ones(3, 4))
    assert torch.equal(DEFT(r=100, alpha=6).weight(torch.zeros(3, 4), p), torch.full((3, 4), 6.0))
