"""OFT by hand: blocks, the series and the inverse, embeddings, and sizes that do not divide."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac import OFT, OptionError
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case, assert_close
from lorac.variants.oft import nearest_divisor
from tests import parity
from tests.limits import decimals
from tests.refusing import refuses


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


SERIES = tensor([[0.9801, 0.198], [-0.198, 0.9801]])
EXACT = tensor([[0.980198, -0.198020], [0.198020, 0.980198]])


@pytest.mark.parametrize(("settings", "expected"), [({}, SERIES), ({"use_cayley_neumann": False}, EXACT)])
def test_worked_rotation(settings, expected):
    """The spec's block: Q₁₂ = 0.1. The inverse turns the other way round."""
    found = OFT(block_size=2, **settings).rotations(tensor([[0.1]]))[0]
    assert decimals(found, 6) == decimals(expected, 6)


def test_terms_of_the_series():
    q = tensor([[0.0, 0.1], [-0.1, 0.0]])
    eye = torch.eye(2, dtype=torch.float64)
    expected = {
        1: eye,
        2: eye + 2 * q,
        3: eye + 2 * q + 2 * q @ q + q @ q @ q,
        4: eye + 2 * q + 2 * q @ q + q @ q @ q,
        5: eye + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q,
    }
    for terms, value in expected.items():
        found = OFT(block_size=2, num_cayley_neumann_terms=terms).rotations(tensor([[0.1]]))[0]
        assert_close(found, value)


def test_the_triangle_is_read_by_rows():
    found = OFT(block_size=3, num_cayley_neumann_terms=2).rotations(tensor([[0.1, 0.2, 0.3]]))[0]
    assert found.tolist() == [[1.0, 0.2, 0.4], [-0.2, 1.0, 0.6], [-0.4, -0.6, 1.0]]


def test_the_constraint():
    """Each block's norm is at most eps/√blocks; a shared block is one."""
    upper = tensor([[3.0], [0.001]])
    variant = OFT(block_size=2, num_cayley_neumann_terms=2, coft=True, eps=0.02)
    q = (variant.rotations(upper) - torch.eye(2, dtype=torch.float64)) / 2
    norms = torch.linalg.vector_norm(q, dim=(1, 2))
    assert_close(norms, tensor([0.02 / 2**0.5, 0.001 * 2**0.5]))
    shared = (variant.rotations(upper[:1]) - torch.eye(2, dtype=torch.float64)) / 2
    assert_close(torch.linalg.vector_norm(shared), tensor(0.02))


@torch.no_grad()
def test_an_embedding_is_rotated_in_its_own_dimensions():
    model = nn.Sequential()
    model.add_module("site", nn.Embedding(3, 2, dtype=torch.float64))
    model.site.weight.data = tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
    tensors = {"site": {"oft_embedding_R": tensor([[0.1]])}}
    adapter = lorac.Adapter("a", OFT(block_size=2, targets=("site",)), tensors)
    compiled = lorac.compile(model, {"a": adapter})
    assert_close(compiled(torch.tensor([0, 1, 2])), model.site.weight @ SERIES)


def test_transforms_the_input_and_is_orthogonal():
    case = Case(OFT(block_size=4, use_cayley_neumann=False), HOSTS["divisible"])
    value = case.live.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 0
    assert value.scales["t"].shape == (3, 4, 4)
    identity = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    assert_close(value.scales["t"] @ value.scales["t"].transpose(1, 2), identity)
    assert not case.live.plans["site"].bound
    assert case.live.explain().terms[0].slots == ("t",)


@pytest.mark.medium("eager, and runtime/test_rows.py has OFT there", cases=["onnxruntime"])
@torch.no_grad()
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_transforms_the_input_alone_and_in_mixtures(target):
    """One more of the same blocks, a LoRA, and an input scale: the sum transforms the input still."""
    rotation = OFT(block_size=4)
    cases = [
        Case(v, HOSTS["divisible"]) for v in (rotation, rotation, lorac.LoRA(r=1), lorac.IA3(feedforward=("site",)))
    ]
    adapters = [
        cases[0].a,
        cases[1].b,
        *(dataclasses.replace(c.a, name=n) for c, n in zip(cases[2:], "cd", strict=True)),
    ]
    x = cases[0].x if target == "eager" else cases[0].x.float()
    model = cases[0].model if target == "eager" else cases[0].model32
    compiled = lorac.compile(model, {a.name: a for a in adapters}, target=target, example_inputs=(x,))
    assert compiled.plans["site"].room["t"] == 4
    assert not compiled.plans["site"].bound
    for choice in ({"a": 1.0}, {"a": 0.4, "b": 0.5}, {"a": 0.4, "c": 0.8, "d": 0.3}, {"c": 1.0}, {}):
        compiled.swap(choice or None)
        weight = cases[0].weight.clone()
        for case, adapter in zip(cases, adapters, strict=True):
            moved = adapter.variant.weight(case.weight, SimpleNamespace(**adapter.tensors["site"])) - case.weight
            weight += choice.get(adapter.name, 0.0) * moved
        expected = torch.nn.functional.linear(cases[0].x, weight, cases[0].bias)
        if choice:
            parity.assert_parity(compiled(x), expected.to(x.dtype), model(x))
        else:
            assert_close(compiled(x), model(x))


def test_blocks_of_different_sizes_need_a_bound_weight():
    cases = [Case(OFT(block_size=size), HOSTS["divisible"]) for size in (4, 3)]
    compiled = cases[0].compiled(cases[0].a, cases[1].b)
    assert compiled.plans["site"].bound
    assert "input transforms in blocks of 3 and 4" in compiled.plans["site"].reasons[-1].why
    alone = cases[0].compiled(cases[0].a)
    with pytest.raises(lorac.NeedsRecompile, match="holds input transforms in blocks of 4, not 3"):
        alone.add_adapter(cases[1].b)


@pytest.mark.parametrize(
    ("number", "wanted", "found"), [(12, 3, 3), (12, 5, 4), (48, 32, 24), (14, 5, 7), (10, 7, 5), (9, 6, 3), (7, 32, 7)]
)
def test_nearest_divisor(number, wanted, found):
    """Of two equally near, as 3 and 9 are to 6, the lower."""
    assert nearest_divisor(number, wanted) == found


def test_rejects_blocks_of_size_1():
    model = HOSTS["linear"].model()
    with refuses("site_unsupported", match="have size 1 and rotate nothing"):
        lorac.compile(model, {"a": OFT(block_size=2, targets=("site",))})  # of 7, to which 1 is nearest


def test_rejects_two_sizes_or_none():
    for fields in ({"r": 2}, {"block_size": 0}):
        with pytest.raises(OptionError, match="a number of blocks or their size"):
            OFT(**fields)
