"""BOFT by hand: one factor is OFT, several mix the blocks, and the permutations are the paper's."""

import pytest
import torch
from torch import nn

import lorac
from lorac import BOFT, OFT, OptionError
from lorac.ir.algebra.changes import Dense
from lorac.testing import HOSTS, Case, assert_close, conformance
from tests.limits import NULL
from tests.oracles import boft as equations
from tests.refusing import refuses

TWO = BOFT(block_size=2, n_butterfly_factor=2)


@pytest.mark.medium("the formula, and the kit's other checks of one factor", keep=["*-formula"])
@pytest.mark.parametrize("check", conformance(TWO, equations, targets=(), hosts={"d": HOSTS["divisible"]}), ids=str)
def test_two_factors_conform(check):
    check()


def rotation(variant, boft_R):
    """R of W' = W·Rᵀ, read off a baked identity."""
    width = boft_R.shape[1] * boft_R.shape[2]
    model = nn.Sequential()
    model.add_module("site", nn.Linear(width, width, bias=False, dtype=torch.float64))
    model.site.weight.data = torch.eye(width, dtype=torch.float64)
    tensors = {"site": {"boft_R": boft_R, "boft_s": torch.ones(width, 1, dtype=torch.float64)}}
    adapter = lorac.Adapter("a", BOFT(**{**variant, "targets": ("site",)}), tensors)
    return lorac.compile(model, {"a": adapter}, mode="baked").host.site.weight.detach().t()


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.medium("two factors", keep=["2"])
@pytest.mark.parametrize("factors", [1, 2, 3])
def test_is_orthogonal_and_reaches_further_with_every_factor(factors):
    """Each factor doubles how many features an output depends on."""
    found = rotation({"block_size": 2, "n_butterfly_factor": factors}, noise(factors, 8, 2, 2))
    assert_close(found @ found.t(), torch.eye(16, dtype=torch.float64))
    assert ((found.abs() > NULL).sum(1) == 2**factors).all()


@pytest.mark.parametrize("factors", [2, 3])
def test_permutations_of_larger_blocks(factors):
    boft_R = noise(factors, 8, 4, 4)
    expected = torch.from_numpy(equations.rotation(boft_R.numpy()))
    found = rotation({"block_size": 4, "n_butterfly_factor": factors}, boft_R)
    assert_close(found, expected)


def test_the_second_permutation_of_the_spec():
    """β = 4, groups of two blocks: units 0 1 2 3 of two columns come as 0 2 1 3."""
    P = equations.permutation(8, 4, 1)
    assert P.argmax(1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert equations.permutation(16, 4, 2).argmax(1).tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]


def test_a_single_factor_equals_oft():
    upper = 0.3 * noise(3, 6)
    rows, columns = torch.triu_indices(4, 4, 1)
    full = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    full[0][:, rows, columns] = 2 * upper
    expected = torch.block_diag(*OFT(block_size=4, use_cayley_neumann=False).rotations(upper))
    assert_close(rotation({"block_size": 4}, full), expected)


def test_the_scale_leaves_the_bias():
    case = Case(BOFT(block_size=3), HOSTS["divisible"])
    value = case.live.pool["a"].changes["site"]
    assert isinstance(value, Dense)
    assert value.e is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 5}, "5 does not divide 12"),
        ({"block_size": 0, "block_num": 5}, "5 does not divide 12"),
        ({"block_size": 3, "n_butterfly_factor": 2}, "even block size"),
        ({"block_size": 2, "n_butterfly_factor": 3}, "multiple of 4 blocks"),
    ],
)
def test_sizes_that_do_not_divide(fields, message):
    with refuses("site_unsupported", match=message):
        lorac.compile(HOSTS["divisible"].model(), {"a": BOFT(**fields, targets=("site",))})


def test_rejects_two_sizes_or_none():
    for fields in ({"block_num": 2}, {"block_size": 0}):
        with pytest.raises(OptionError, match="a number of blocks or their size"):
            BOFT(**fields)
    with pytest.raises(OptionError, match="takes numbers from 1"):
        BOFT(n_butterfly_factor=0)
