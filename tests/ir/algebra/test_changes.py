"""Values of the normal forms: merged, composed, truncated, and relative to the base's output."""

import pytest
import torch
from torch import Tensor

from lorac.ir.algebra.changes import (
    Dense,
    LowRank,
    Sparse,
    SparseSum,
    compose,
    from_outputs,
    list_tensors,
    map_tensors,
    merge_bias,
    merge_weight,
    to_outputs,
)
from lorac.ir.algebra.operands import A, B, C, D, T
from lorac.testing import assert_close

OUT, IN, R = 6, 4, 3


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64)


def _unread():
    pytest.fail("the base was read without need")


@pytest.fixture
def values():
    return {
        "low-rank": LowRank(rand(IN, R), rand(R, OUT)),
        "scaled": LowRank(rand(IN, R), rand(R, OUT), {C: rand(OUT)}, e=rand(OUT)),
        "both scales": LowRank(rand(IN, R), rand(R, OUT), {C: rand(OUT), D: rand(IN)}),
        "transform": LowRank(rand(IN, R), rand(R, OUT), {T: rand(2, 2, 2)}),
        "everything": LowRank(rand(IN, R), rand(R, OUT), {C: rand(OUT), D: rand(IN), T: rand(2, 2, 2)}, e=rand(OUT)),
        "input scale": LowRank(rand(IN, R), rand(R, OUT), {D: rand(IN)}),
        "smaller blocks": LowRank(rand(IN, R), rand(R, OUT), {T: rand(4, 1, 1)}),
        "sparse": Sparse(torch.tensor([0, 5, 2]), torch.tensor([3, 0, 2]), rand(3), rand(OUT)),
        "dense": Dense(rand(OUT, IN), rand(OUT)),
    }


def by_hand(value, W, b):
    """W' and b' entry by entry."""
    if isinstance(value, LowRank):
        c, d = value.scales.get(C, torch.ones(OUT)), value.scales.get(D, torch.ones(IN))
        turned = torch.block_diag(*value.scales[T]) if T in value.scales else torch.eye(IN).double()
        new = torch.diag(c.double()) @ W @ (torch.diag(d.double()) @ turned).t() + (value.a @ value.b).t()
        return new, b + (0 if value.e is None else value.e)
    new = value.weight.clone() if isinstance(value, Dense) else W.clone()
    if isinstance(value, Sparse):
        for row, column, entry in zip(value.rows, value.cols, value.values, strict=True):
            new[row, column] += entry
    return new, b + value.e


@pytest.mark.parametrize("name", ["low-rank", "scaled", "both scales", "transform", "everything", "sparse", "dense"])
def test_merge(values, name):
    W, b, value = rand(OUT, IN), rand(OUT), values[name]
    before = W.clone()
    expected = by_hand(value, W, b)
    assert_close(merge_weight(value, W), expected[0])
    assert_close(merge_bias(value, b), expected[1])
    assert torch.equal(W, before)


@pytest.mark.parametrize(
    "names",
    [
        ("low-rank",),
        ("low-rank", "scaled"),
        ("scaled", "sparse"),
        ("both scales", "low-rank"),
        ("transform",),
        ("transform", "input scale", "low-rank", "transform"),
        ("transform", "scaled"),
        ("everything", "low-rank"),
        ("transform", "smaller blocks"),
        ("sparse", "sparse"),
        ("dense", "scaled", "sparse"),
    ],
    ids="+".join,
)
def test_compose_is_the_weighted_sum_against_the_base(values, names):
    W, b = rand(OUT, IN), rand(OUT)
    terms = [(0.7 - 0.2 * i, values[name]) for i, name in enumerate(names)]
    expected_weight, expected_bias = W.clone(), b.clone()
    for strength, value in terms:
        weight, bias = by_hand(value, W, b)
        expected_weight += strength * (weight - W)
        expected_bias += strength * (bias - b)
    total = compose(terms, lambda: W)
    assert_close(merge_weight(total, W), expected_weight)
    assert_close(merge_bias(total, b), expected_bias)


def test_compose_returns_a_single_value_at_full_strength(values):
    assert compose([(1.0, values["sparse"])], _unread) is values["sparse"]
    assert compose([], _unread) is None


def test_overlapping_sparse_terms_add(values):
    W, sparse = rand(OUT, IN), values["sparse"]
    total = compose([(0.5, sparse), (2.0, sparse)], _unread)
    assert isinstance(total, SparseSum)
    assert_close(merge_weight(total, W) - W, 2.5 * (by_hand(sparse, W, rand(OUT))[0] - W))


def test_truncated_keeps_the_first_components(values):
    W, value = rand(OUT, IN), values["low-rank"]
    cut = value.truncated(2)
    assert (value.rank, cut.rank) == (3, 2)
    assert_close(merge_weight(cut, W), W + (value.a[:, :2] @ value.b[:2]).t())


@pytest.mark.parametrize("biased", [True, False])
def test_scaled_outputs_keep_the_bias_of_the_base(biased):
    """c scales the product with W only."""
    b = rand(OUT) if biased else None
    value = from_outputs("low-rank", {A: rand(IN, R), B: rand(R, OUT), C: rand(OUT)}, b)
    assert value.e is None
    assert merge_bias(value, b) is b


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_merged_in_the_wider_dtype(dtype):
    W = rand(OUT, IN).to(dtype)
    value = LowRank(rand(IN, R).float(), rand(R, OUT).float())
    expected = (W.float() + (value.a @ value.b).t()).to(dtype)
    merged = merge_weight(value, W)
    assert merged.dtype == dtype
    assert torch.equal(merged, expected)


def to_meta(tensor):
    return tensor.to("meta")


def test_edits_every_tensor_of_a_change(values):
    for change in values.values():
        gone, stayed = map_tensors(to_meta, change), map_tensors(Tensor.clone, change)
        assert not any(tensor.is_meta for tensor in list_tensors(change))
        assert all(tensor.is_meta for tensor in list_tensors(gone))
        (form, tensors), (other, found), (same, kept) = map(to_outputs, (change, gone, stayed))
        assert form == other == same and tensors.keys() == found.keys() == kept.keys()
        assert all(tensor.is_meta and tensor.shape == tensors[letter].shape for letter, tensor in found.items())
        assert all(torch.equal(kept[letter], tensor) for letter, tensor in tensors.items())
    sparse = values["sparse"]
    several = map_tensors(to_meta, SparseSum(((0.5, sparse), (2.0, sparse)), sparse.e))
    assert several.e.is_meta
    assert [strength for strength, _ in several.terms] == [0.5, 2.0]
    assert all(t.is_meta for _, term in several.terms for t in (term.rows, term.cols, term.values))
