"""TLoRA by hand: the transform's two index orders, its start, published counts, and the ring residual."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac import OptionError, Site, SiteKind, TLoRA
from lorac.ir.algebra.changes import Dense, LowRank
from lorac.testing import HOSTS, assert_close, conformance
from tests.oracles import tlora as equations
from tests.refusing import refuses

RING = TLoRA(transform_rank=2, r=2, residual="ttv", index_order="little", alpha=0.7, rslora=False)


@pytest.mark.medium("the formula, and the kit's other checks of trains", keep=["*-formula", "*-admitted"])
@pytest.mark.parametrize("check", conformance(RING, equations, targets=(), hosts={"d": HOSTS["divisible"]}), ids=str)
def test_rings_conform(check):
    check()


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def transform(variant, *cores):
    """T, as W' of the identity under a zero residual."""
    size = math.prod(len(core) for core in cores)
    zero = {"lora_A": torch.zeros(1, size).double(), "lora_B": torch.zeros(size, 1).double()}
    p = SimpleNamespace(**{f"transform_core_{d}": core for d, core in enumerate(cores)}, **zero)
    return variant.weight(torch.eye(size, dtype=torch.float64), p)


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("big", [[2, 0, 1, 0], [0, 1, 0, 0.5], [0, 0, 2, 0], [0, 0, 0, 1]]),
        ("little", [[2, 1, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0.5], [0, 0, 0, 1]]),
    ],
)
def test_rings_of_rank_1_are_kronecker_products(order, expected):
    first, second = tensor([[1.0, 0.5], [0.0, 1.0]]), tensor([[2.0, 0.0], [0.0, 1.0]])
    assert transform(TLoRA(index_order=order, dims=((2, 2),)), first, second).tolist() == expected


@pytest.mark.parametrize("order", ["big", "little"])
def test_entries_by_brute_force(order):
    generator = torch.Generator().manual_seed(0)
    cores = [torch.randn(n, n, 3, 3, generator=generator, dtype=torch.float64) for n in (2, 3, 4)]
    found = transform(TLoRA(transform_rank=3, index_order=order), *cores)
    p = SimpleNamespace(**{f"transform_core_{d}": core.numpy() for d, core in enumerate(cores)})
    expected = torch.from_numpy(equations.transform(p, TLoRA(index_order=order), 24))
    assert_close(found, expected)
    assert torch.linalg.matrix_rank(found) == 24


def test_product_of_two_transforms():
    """The ring of a product has the product of the ring ranks: cores Σ A[a, l] ⊗ B[b, l]."""
    generator = torch.Generator().manual_seed(0)
    one, other = ([torch.randn(n, n, 2, 2, generator=generator, dtype=torch.float64) for n in (2, 3)] for _ in range(2))
    joint = [
        torch.einsum("alpq,lbrs->abprqs", a, b).reshape(len(a), len(a), 4, 4) for a, b in zip(one, other, strict=True)
    ]
    product = transform(TLoRA(), *one) @ transform(TLoRA(), *other)
    assert_close(transform(TLoRA(), *joint), product)


def fresh(variant, out, columns):
    model = nn.Sequential()
    model.add_module("site", nn.Linear(columns, out, dtype=torch.float64))
    return model, lorac.compile(model, {"a": variant})


@pytest.mark.medium("the other", cases=["ttv-*"])
@pytest.mark.slow("each kind of residual once", keep=["lora-3", "ttv-3"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("residual", ["lora", "ttv"])
def test_starts_at_the_base_and_trains_the_right_factors_first(rank, residual):
    model, compiled = fresh(TLoRA(transform_rank=rank, r=2, residual=residual, targets=("site",)), 12, 24)
    compiled.train()
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = compiled(x)
    assert_close(y.detach(), model(x).detach())
    y.square().sum().backward()
    tensors = compiled.adapters["a"].tensors["site"]
    moved = {name for name, tensor in tensors.items() if tensor.grad is not None and bool(tensor.grad.any())}
    first = {"lora_B"} if residual == "lora" else {"ttv_core_0"}
    assert moved == first | {name for name in tensors if name.startswith("transform_core_")}


@pytest.mark.medium("rings of two", keep=["factors0-1"])
@pytest.mark.slow("two shapes of factors", keep=["factors0-1", "factors3-5"])
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("factors", [(24,), (4, 6), (2, 3, 4), (2, 2, 3, 2)])
def test_the_transform_starts_as_the_identity(factors, rank):
    variant = TLoRA(transform_rank=rank, r=1, dims=(factors,), targets=("site",))
    cores = fresh(variant, 24, 24)[1].adapters["a"].tensors["site"]
    cores = [cores[f"transform_core_{d}"].detach() for d in range(len(factors))]
    assert [core.shape for core in cores] == [(n, n, rank, rank)[: 2 if rank == 1 else 4] for n in factors]
    found = transform(TLoRA(transform_rank=rank, dims=(factors,)), *cores)
    assert_close(found, torch.eye(24, dtype=torch.float64))


def test_forms():
    for variant, form in ((TLoRA(targets=("site",)), Dense), (TLoRA(transform_rank=0, targets=("site",)), LowRank)):
        assert isinstance(fresh(variant, 12, 24)[1].pool["a"].changes["site"], form)
    ring = TLoRA(transform_rank=0, r=2, residual="ttv", targets=("site",))
    value = fresh(ring, 12, 24)[1].pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 4


_WIDTHS = {320: 5, 640: 5, 1280: 6}
"""SD-1.5's blocks with attention, by width."""


def _count(variant, layers):
    return sum(
        number * sum(math.prod(spec.shape) for spec in variant.params(site(out, columns)).values())
        for (out, columns), number in layers.items()
    )


def site(out, columns):
    return Site("site", SiteKind.LINEAR, out, columns, torch.float32, "site.weight")


def test_published_counts():
    """SD-1.5: 16 blocks, 8 projections each, the keys and values of the second attention from 768 features."""
    layers = {}
    for width, blocks in _WIDTHS.items():
        layers |= {(width, width): 6 * blocks, (width, 768): 2 * blocks}
    assert sum(layers.values()) == 128
    assert _count(TLoRA(transform_rank=0, r=4), layers) == 797_184
    assert _count(TLoRA(transform_rank=2, r=4), layers) == 941_440
    assert _count(TLoRA(transform_rank=2, r=6, residual="ttv"), layers) == 400_288


def test_published_counts_of_sdxl():
    """SDXL: 10 blocks of 640 and 60 of 1280; text features are 2048 wide."""
    layers = {(640, 640): 60, (640, 2048): 20, (1280, 1280): 360, (1280, 2048): 120}
    assert sum(layers.values()) == 560
    assert _count(TLoRA(transform_rank=0, r=1), layers) == 1_451_520
    assert _count(TLoRA(transform_rank=1, r=2, residual="ttv"), layers) == 396_720


def test_factors():
    assert [TLoRA().factors(n) for n in (320, 640, 768, 1280, 2048)] == [
        (4, 8, 10),
        (8, 8, 10),
        (8, 8, 12),
        (8, 10, 16),
        (8, 16, 16),
    ]
    assert TLoRA().factors(64) == (4, 4, 4)
    assert TLoRA(dims=((8, 8),)).factors(64) == (8, 8)
    assert TLoRA(dims=[[8, 8]]) == TLoRA(dims=((8, 8),))


def test_refusals():
    with refuses("site_unsupported", match="as many factors"):
        fresh(TLoRA(residual="ttv", dims=((4, 6),), targets=("site",)), 12, 24)
    for fields in ({"residual": "ttm"}, {"index_order": "bgi"}):
        with pytest.raises(OptionError):
            TLoRA(**fields)
