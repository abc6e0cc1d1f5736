"""The five masks of SHiRA: which positions of a weight are trained."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac.variants import shira
from lorac.variants.params import InitContext
from tests.refusing import refuses

WEIGHT = torch.tensor([[3.0, -1.0, 0.5], [0.2, -4.0, 2.0]])
GRADIENTS = {"site": torch.tensor([[0.1, 5.0, -9.0], [0.3, 0.1, 3.0]])}


def context(weight, name="a", path="site", seed=0, count=2):
    model = nn.ModuleDict({path: nn.Linear(weight.shape[1], weight.shape[0])})
    site = lorac.sites(model)[path]
    return InitContext((2, count), site, lambda: weight, SimpleNamespace(), torch.Generator().manual_seed(seed), name)


def positions(indices):
    assert indices.dtype == torch.int64
    return list(map(tuple, indices.t().tolist()))


@pytest.mark.parametrize(
    ("maker", "expected"),
    [
        (shira.magnitude_mask(), [(0, 0), (1, 1)]),
        (shira.gradient_mask(GRADIENTS), [(0, 1), (0, 2)]),
        (shira.snip_mask(GRADIENTS), [(0, 1), (1, 2)]),
    ],
    ids=["magnitude", "gradient", "snip"],
)
def test_worked_example(maker, expected):
    assert positions(maker.make(context(WEIGHT))) == expected


def test_equal_scores_go_to_the_lowest_position():
    assert positions(shira.magnitude_mask().make(context(torch.ones(3, 5), count=4))) == [(0, i) for i in range(4)]


def test_magnitude_masks_of_several_tasks_do_not_overlap():
    weight = torch.randn(6, 7)
    found = [set(positions(shira.magnitude_mask(task=t).make(context(weight, count=5)))) for t in range(3)]
    assert len(set().union(*found)) == 15
    ranked = weight.abs().flatten().sort(descending=True).values
    assert sorted(abs(float(weight[p])) for p in found[1]) == sorted(ranked[5:10].tolist())


def test_struct_at_size():
    """4096 x 4096, every 100th row: 41 rows and the diagonal, 171 991 positions."""
    site = context(torch.empty(4096, 4096)).site
    maker = shira.struct_mask(100)
    assert maker.entries(site) == 171_991
    indices = maker.make(context(torch.empty(4096, 4096)))
    assert indices.shape == (2, 171_991)
    rows, counts = indices[0].unique(return_counts=True)
    assert (counts == 4096).sum() == 41
    assert rows[counts == 4096].tolist() == list(range(0, 4096, 100))


@pytest.mark.parametrize(("out", "columns", "every", "offset"), [(7, 11, 3, 0), (11, 7, 4, 2)])
def test_struct_counts_as_the_formula(out, columns, every, offset):
    rows = range(offset, out, every)
    on_diagonal = sum(row < min(out, columns) for row in rows)
    indices = shira.struct_mask(every, offset).make(context(torch.empty(out, columns)))
    assert indices.shape[1] == len(rows) * columns + min(out, columns) - on_diagonal
    values = torch.zeros(out, columns)
    values[tuple(indices)] = torch.randn(indices.shape[1])
    assert torch.linalg.matrix_rank(values) == min(out, columns)


@pytest.mark.parametrize(("size", "every"), [(12, 5), (9, 2)])
def test_struct_has_full_rank_by_its_diagonal(size, every):
    """The rows alone, as 0 and 1, have rank 1; with the diagonal those left add one each, and values all."""
    indices = shira.struct_mask(every).make(context(torch.empty(size, size)))
    chosen = list(range(0, size, every))
    rows, mask, values = (torch.zeros(size, size, dtype=torch.float64) for _ in range(3))
    rows[chosen] = 1
    mask[tuple(indices)] = 1
    values[tuple(indices)] = torch.randn(indices.shape[1], generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(mask, rows.logical_or(torch.eye(size)).double())
    assert torch.linalg.matrix_rank(rows) == 1
    assert torch.linalg.matrix_rank(mask) == size - len(chosen) + 1
    assert torch.linalg.matrix_rank(values) == size


def test_random_is_exact_distinct_sorted_and_its_own_per_adapter_and_site():
    model = nn.ModuleDict({"a": nn.Linear(7, 11), "b": nn.Linear(7, 11)})
    variant = lorac.SHiRA(ratio=0.25, targets=("a", "b"))

    def masks(name):
        tensors = lorac.compile(model, {name: variant}).adapters[name].tensors
        return [positions(at["indices"]) for at in tensors.values()]

    one, two = masks("one"), masks("two")
    for mask in one:
        assert mask == sorted(set(mask))
        assert len(mask) == round(0.25 * 77)
    assert len({tuple(mask) for mask in one + two}) == 4
    assert masks("one") == one


MAKERS = {
    "struct": shira.struct_mask(3),
    "snip": shira.snip_mask(GRADIENTS),
    "gradient": shira.gradient_mask(GRADIENTS),
    "random": shira.random_mask(),
    "magnitude": shira.magnitude_mask(),
}


@pytest.mark.parametrize("mask", MAKERS)
def test_a_variant_takes_every_maker(mask):
    """By one meaning of r and ratio, whatever chooses; a mask that has its own number takes neither."""
    model = nn.ModuleDict({"site": nn.Linear(3, 2)})
    model["site"].weight.data = WEIGHT.clone()
    maker, ratio = MAKERS[mask], {"ratio": 0.5}
    if maker.entries is not None:
        for given in (ratio, {"r": 1}):
            with refuses("option_error", match=f"itself, and {next(iter(given))}="):
                lorac.SHiRA(mask=maker, **given)
        ratio = {}
    variant = lorac.SHiRA(mask=maker, targets=("site",), **ratio)
    indices = lorac.compile(model, {"a": variant}).adapters["a"].tensors["site"]["indices"]
    assert indices.shape == (2, 3 if ratio else 4)
    if mask != "random":
        assert torch.equal(indices, maker.make(context(WEIGHT, count=3)))


def test_unknown_name():
    with pytest.raises(lorac.OptionError, match="magnitude"):
        lorac.compile(nn.ModuleDict({"s": nn.Linear(3, 2)}), {"a": lorac.SHiRA(mask="magnitud", ratio=0.5)})
