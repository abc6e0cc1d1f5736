"""Partly learnable projections by hand."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac import Role, SiteKind
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case, Host, assert_close, conformance
from lorac.testing.models import chain_layers
from lorac.variants.params import InitContext
from tests.oracles import plp as oracle
from tests.refusing import refuses

SQUARE = Host(
    "square",
    SiteKind.LINEAR,
    lambda: chain_layers(site=nn.Linear(10, 10)),
    (10,),
    lambda x, weight, bias: x @ weight.T + bias,
)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def fresh(host=SQUARE, **fields):
    """The tensors of a fresh adapter, and W' − W."""
    case = Case(lorac.PLP(**{"r": 4, **fields}), host)
    p = lorac.compile(case.model, {"a": case.variant}).adapters["a"].tensors["site"]
    with torch.no_grad():
        return p, case.variant.weight(case.weight, SimpleNamespace(**p)) - case.weight


def test_worked_example():
    """A=[[1,0]], E=[[0,2]], C=[[0],[1]], D=[[3],[4]]."""
    p = SimpleNamespace(
        up_frozen=tensor([[1, 0]]),
        up_learned=tensor([[0, 2]]),
        down_frozen=tensor([[0], [1]]),
        down_learned=tensor([[3], [4]]),
    )
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    assert lorac.PLP(r=2).weight(zeros, p).tolist() == [[0, 3], [2, 8]]
    p.up_frozen[0, 1] = 5
    assert lorac.PLP(r=2).weight(zeros, p).tolist() == [[5, 23], [2, 8]]
    assert lorac.PLP(r=2, identity_init=True).weight(zeros, p).tolist() == [[0, 23], [2, 8]]


CHECKS = conformance(lorac.PLP(r=3, identity_init=True), oracle, targets=(), hosts={"square": SQUARE})


@pytest.mark.medium("the formula, and the kit's other checks of its other configurations", keep=["*-formula"])
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_conforms_at_square_sites(check):
    check()


@pytest.mark.medium("each start once", keep=["False-none", "True-exact", "True-rows"])
@torch.no_grad()
@pytest.mark.parametrize("basis", ["rows", "exact", "none"])
@pytest.mark.parametrize("identity_init", [False, True])
def test_where_a_square_site_begins(basis, identity_init):
    p, moved = fresh(basis=basis, identity_init=identity_init)
    fixed = p["up_frozen"] @ p["down_frozen"]
    assert bool(fixed.any()) == (basis == "rows")
    assert bool(p["up_frozen"].any()) == (basis != "none")
    if identity_init or basis == "none":
        assert not moved.any()
    else:
        assert moved.any()
        assert not moved[5:].any()
        assert_close(moved[:5, :5], fixed)


def test_other_sites_begin_at_the_identity():
    p, moved = fresh(HOSTS["divisible"], r=2)
    assert not moved.any()
    assert not p["up_frozen"].any() and p["down_frozen"].any() and p["down_learned"].any()


def test_bases_are_disjoint_rows_of_an_orthogonal_matrix():
    """Of a square site 1280 wide the two halves are all its rows, and its columns are orthonormal."""
    site = dataclasses.replace(SQUARE.site, out_features=1280, in_features=1280)
    specs = lorac.PLP(r=8).params(site)
    generator = torch.Generator().manual_seed(3)
    a, c = (
        specs[name].init(InitContext(specs[name].shape, site, lambda: None, SimpleNamespace(), generator, "a"))
        for name in ("up_frozen", "down_frozen")
    )
    assert (a.shape, c.shape) == ((640, 8), (8, 640))
    basis = torch.cat([a, c.t()])
    assert_close(basis.t() @ basis, torch.eye(8))
    assert len(basis.unique(dim=0)) == 1280


def halves(**fields):
    """A content's and a style's adapter, and the case they belong to."""
    case = Case(lorac.PLP(**{"r": 2, **fields}), HOSTS["no_bias"])
    return case, case.a, case.b


@torch.no_grad()
def test_joined_halves_are_the_styles_with_the_contents_learned_columns():
    case, content, style = halves()
    joined = lorac.PLP.join(content, style, name="both")
    own = joined.tensors["site"]
    kept = {name for name in own if own[name] is style.tensors["site"][name]}
    assert kept == {"up_frozen", "up_learned", "down_frozen"}
    assert own["down_learned"] is content.tensors["site"]["down_learned"]
    alone, both = (case.variant.weight(case.weight, SimpleNamespace(**a.tensors["site"])) for a in (style, joined))
    left = case.weight.shape[1] // 2
    assert torch.equal(alone[:, :left], both[:, :left])
    assert (alone[:, left:] != both[:, left:]).all()
    expected = torch.nn.functional.linear(case.x, both)
    assert_close(case.compiled(joined)(case.x), expected)


def test_halves_that_do_not_belong_together():
    _, content, style = halves()
    with pytest.raises(lorac.ChoiceError, match=r"'b' \(plp \(3, 'rows', False\)\) does not fit 'a'"):
        lorac.PLP.join(halves(r=3)[2], content, name="x")
    with pytest.raises(lorac.ChoiceError, match=r"'a' \(lora"):
        lorac.PLP.join(Case(lorac.LoRA(r=2), HOSTS["no_bias"]).a, style, name="x")
    elsewhere = lorac.Adapter("c", content.variant, {"other": content.tensors["site"]})
    with refuses("site_not_found", match="do not both adapt 'other'"):
        lorac.PLP.join(elsewhere, style, name="x")


@pytest.mark.parametrize(("identity_init", "rank"), [(False, 2), (True, 4)])
def test_reduces_to_low_rank(identity_init, rank):
    case = Case(lorac.PLP(r=2, identity_init=identity_init), SQUARE)
    value = case.live.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == rank


def test_half_of_each_factor_trains():
    specs = lorac.PLP(r=3).params(HOSTS["linear"].site)  # 7 -> 11
    shapes = {name: spec.shape for name, spec in specs.items() if spec.role is Role.TRAINABLE}
    assert shapes == {"up_learned": (6, 3), "down_learned": (3, 4)}


def test_unknown_basis():
    with pytest.raises(lorac.OptionError, match="no basis='row'") as error:
        lorac.PLP(basis="row")
    assert error.value.nearest == "rows"
