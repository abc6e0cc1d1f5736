"""LoRA-LEGO, as its paper and two implementations of it agree."""

import math

import pytest
import torch

import lorac
from lorac.merging.clustering import cluster, sort_points
from lorac.testing import assert_close
from tests.limits import rank_of
from tests.merging.hosts import deltas, host, lora
from tests.merging.test_ways import matrix, of_pair, tensor
from tests.refusing import refuses


def unit(name, row, column):
    return of_pair(name, tensor(*([entry] for entry in column)), tensor(row), 1.0)


def test_the_example_of_three_ranks():
    """u = [1,0,2,0], [0,1,2,0], [0,1,0,−3]: the first two are one cluster, the third another."""
    parts = [unit("a", [1, 0], [2, 0]), unit("b", [0, 1], [2, 0]), unit("c", [0, 1], [0, -3])]
    found = matrix(lorac.merge(parts, "lego", rank=2))
    assert_close(found, tensor([1, 1], [0, -3]) / math.sqrt(2))
    assert_close(matrix(lorac.merge(parts, "lego", rank=2, reweight_output=False)), tensor([1, 1], [0, -3]))


def test_a_mean_is_scaled_to_its_members():
    """[2,0,1,0] and [0,2,1,0] have the mean [1,1,1,0], whose largest entry is half of theirs."""
    parts = [unit("a", [2, 0], [1, 0]), unit("b", [0, 2], [1, 0])]
    assert_close(matrix(lorac.merge(parts, "lego", rank=1)), tensor([4, 4], [0, 0]))
    length = math.sqrt(5 / 3)
    expected = length**2 * tensor([1, 1], [0, 0])
    assert_close(matrix(lorac.merge(parts, "lego", rank=1, norm="l2")), expected)


def test_keeps_a_single_part_and_equal_parts():
    one = lora("a", 1, r=3, alpha=5)
    expected = deltas(one, host())
    copies = [lora(name, 1, r=3, alpha=5) for name in "abc"]
    for merged in (
        lorac.merge([one], "lego", [0.5]),
        lorac.merge(copies, "lego"),
        lorac.merge(copies, "lego", [3, 1, 2]),
    ):
        for path, found in deltas(merged, host()).items():
            assert_close(found, expected[path])


def test_every_rank_alone_gives_the_sum():
    parts = [lora("a", 1, r=3, alpha=5), lora("b", 2, r=3, alpha=2)]
    total = deltas(lorac.merge(parts, "cat"), host())
    for options, factor in (({}, math.sqrt(0.5)), ({"reweight_output": False}, 1.0)):
        for path, found in deltas(lorac.merge(parts, "lego", rank=6, **options), host()).items():
            assert_close(found, factor * total[path])


@pytest.mark.parametrize("options", [{}, {"feature": "normalized"}, {"canonicalize_sign": True}, {"balance": True}])
def test_the_order_of_ranks_does_not_matter(options):
    parts = [lora("a", 1, r=4, alpha=5), lora("b", 2, r=3, alpha=2)]
    turned = []
    for part in parts:
        order = torch.randperm(part.variant.r)
        tensors = {
            path: {"lora_A": at["lora_A"][order], "lora_B": at["lora_B"][:, order]} for path, at in part.tensors.items()
        }
        turned.append(lorac.Adapter(part.name, part.variant, tensors))
    expected = lorac.merge(parts, "lego", rank=3, **options)
    for found in (lorac.merge(turned, "lego", rank=3, **options), lorac.merge(parts[::-1], "lego", rank=3, **options)):
        for path, at in expected.tensors.items():
            assert all(torch.equal(found.tensors[path][name], tensor) for name, tensor in at.items())
        assert max(rank_of(delta) for delta in deltas(found, host()).values()) == 3


def test_options_that_make_equal_terms_equal():
    """(a, b) and (−a, −b) are one term, and (2·a, b/2) too."""
    part = lora("a", 1, r=2, alpha=2)

    def scaled(name, factor):
        tensors = {
            path: {"lora_A": factor * at["lora_A"], "lora_B": at["lora_B"] / factor}
            for path, at in part.tensors.items()
        }
        return lorac.Adapter(name, part.variant, tensors)

    for factor, option in ((-1, "canonicalize_sign"), (2, "balance")):
        merged = lorac.merge([part, scaled("b", factor)], "lego", **{option: True})
        for path, delta in deltas(merged, host()).items():
            assert_close(delta, deltas(part, host())[path])


def test_biases_are_averaged():
    parts = [lora("a", 1, r=2, lora_bias=True), lora("b", 1, r=2, lora_bias=True)]
    merged = lorac.merge(parts, "lego", [3, 1], model=host())
    found = lorac.factors(merged, host())
    for path, change in lorac.factors(parts[0], host()).items():
        assert_close(found[path].e, change.e)


def test_rejects_negative_weights():
    parts = [lora("a", 1, r=2), lora("b", 2, r=2)]
    with refuses("choice_error", match="'lego' takes shares of clusters"):
        lorac.merge(parts, "lego", [1, -1])


def test_clusters_that_lie_apart_are_found():
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(5, 7, dtype=torch.float64, generator=generator)
    truth = torch.arange(60) % 5
    points = centres[truth] + 0.1 * torch.randn(60, 7, dtype=torch.float64, generator=generator)
    order = sort_points(points)
    labels = cluster(points[order], torch.ones(60).double(), 5, generator, tries=10, steps=300)
    pairs = {(int(one), int(other)) for one, other in zip(labels, truth[order], strict=True)}
    assert len(pairs) == 5
    equal = torch.ones(6, 2).double()
    assert len(cluster(equal, torch.ones(6).double(), 3, generator, tries=2, steps=5)) == 6
