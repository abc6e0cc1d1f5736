"""Entanglement entropies: worked cases, Gaussian matrices, the valley of a low rank and its bound."""

import math

import pytest
import torch

import lorac
from lorac import AdapterError
from lorac.analysis.entanglement import (
    adapter_entanglement,
    draw_entanglement,
    internal_entropy,
    prime_sites,
    random_entropy,
    rank_bound,
)
from lorac.testing import assert_close
from tests.limits import assert_apart, assert_at_most, assert_deviation, assert_mean, decimals
from tests.refusing import refuses

LN2 = math.log(2)
HALF = 0.500402
"""S of the weights 0.8 and 0.2: −0.8·ln 0.8 − 0.2·ln 0.2 = 0.178515 + 0.321888."""


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(out, columns, rank, seed=0):
    return gaussian(out, rank, seed=seed) @ gaussian(rank, columns, seed=1000 + seed)


def assert_nats(found, expected):
    """Compared as numbers of states e^S, so that no entropy has a size, too."""
    assert_close(found.double().exp(), tensor(expected).exp())


def test_rank_one_has_no_entropy_at_the_center():
    found = internal_entropy(low_rank(8, 16, 1))
    assert found.shape == (6,)
    assert_nats(found[2:3], [0])
    assert (found[[1, 3, 4]] > 0.1).all()


def test_the_identity_of_four():
    assert_nats(internal_entropy(torch.eye(4), [2, 2], [2, 2]) / LN2, [1, 2, 1])


def test_two_singular_values():
    assert decimals(internal_entropy(torch.diag(tensor([1, 0.5])), [2], [2]), 6) == [HALF]
    assert decimals(internal_entropy(-3e-20 * torch.diag(tensor([1, 0.5])), [2], [2]), 6) == [HALF]


def test_a_symmetric_matrix_has_no_symmetric_profile():
    """diag(1, 0.5) ⊗ ones: output and input digit of the first factor are entangled, those of the second are not."""
    M = torch.kron(torch.diag(tensor([1, 0.5])), torch.ones(2, 2, dtype=torch.float64))
    assert torch.equal(M, M.t())
    assert decimals(internal_entropy(M), 6) == [HALF, HALF, 0]


def test_interleaved_sites_of_a_kronecker_product_are_not_entangled():
    M = torch.kron(gaussian(2, 3), gaussian(5, 2))
    assert_nats(internal_entropy(M, [2, 5], [3, 2], order="interleaved"), [0])
    assert (internal_entropy(M, [2, 5], [3, 2]) > 0.1).all()


def test_interleaves_digits_of_rows_and_columns():
    """Cut 1 of outputs 2·3·2 and inputs 3·1·4: rows are (p₁, q₁), columns the four digits left."""
    M = gaussian(12, 12)
    found = internal_entropy(M, [2, 3, 2], [3, 1, 4], order="interleaved")
    pairs = M.reshape(2, 6, 3, 4).transpose(1, 2).reshape(6, 24)
    later = M.reshape(6, 2, 3, 4).transpose(1, 2).reshape(18, 8)
    expected = [internal_entropy(cut, [len(cut)], [cut.shape[1]])[0] for cut in (pairs, later)]
    assert_close(found, torch.stack(expected))


def test_measures_each_head_of_an_attention_map():
    attention = gaussian(2, 3, 16, 16).softmax(-1)
    found = internal_entropy(attention)
    assert found.shape == (2, 3, 7)
    assert_close(found[1, 2], internal_entropy(attention[1, 2]))
    assert found.flatten(0, 1).unique(dim=0).shape == (6, 7)


def test_uniform_attention_has_no_entropy():
    assert_nats(internal_entropy(torch.full((8, 8), 1 / 8)), [0] * 5)


def test_a_square_gaussian_is_near_its_limit():
    """256 x 256: ln 256 − 1/2 = 5.0452; the mean of 20 draws is 5.0427, their deviation 0.0021."""
    assert round(random_entropy(256, 256), 4) == 5.0452
    draws = [internal_entropy(gaussian(256, 256, seed=seed), [256], [256]).item() for seed in range(20)]
    assert_mean(tensor(draws), 5.0427, 4)
    assert_deviation(tensor(draws) - tensor(draws).mean(), 0.0021)


@pytest.mark.parametrize("shape", [(64, 256), (256, 64)])
def test_an_oblong_gaussian_is_near_its_limit(shape):
    """ln 64 − 64/512 = 4.0339; the deviation of a draw is 0.003."""
    assert round(random_entropy(*shape), 4) == 4.0339
    draws = [internal_entropy(gaussian(*shape, seed=seed), *[[n] for n in shape]).item() for seed in range(10)]
    assert_mean(tensor(draws), 4.0339, 4)


def test_a_low_rank_has_two_humps_and_a_valley():
    """2⁸ x 2⁸ of rank 4, in bits; of ten draws none is more than 0.07 from their mean, at either hump."""
    draws = torch.stack([internal_entropy(low_rank(256, 256, 4, seed), [2] * 8, [2] * 8) / LN2 for seed in range(10)])
    mean = draws.mean(0)
    assert decimals((draws - mean).abs().max(), 2) == [0.07]
    for at, printed in enumerate([0.99, 1.98, 2.95, 3.85, 4.24, 3.82, 2.95, 1.97, 2.94]):
        assert_mean(draws[:, at], printed, 2)
    # At l = (n + log₂ r)/2 = 5 and its mirror image.
    assert sorted(mean.topk(2).indices.tolist()) == [4, 10]
    assert_at_most(draws[:, 7], torch.full_like(draws[:, 7], 2))
    full = internal_entropy(gaussian(256, 256), [2] * 8, [2] * 8)
    assert full.argmax() == 7
    assert (full.diff() > 0).tolist() == [True] * 7 + [False] * 7


def test_the_bound_of_a_rank():
    """ln 2·min(l, (n − l) + log₂ r), mirrored: n = 8, r = 4."""
    assert_nats(rank_bound(4, [2] * 8, [2] * 8) / LN2, [1, 2, 3, 4, 5, 4, 3, 2, 3, 4, 5, 4, 3, 2, 1])
    assert_nats(rank_bound(3, [3, 2], [2, 5]).exp(), [3, 3, 5])
    assert_nats(rank_bound(1, [2, 3, 2], [3, 1, 4], "interleaved").exp(), [6, 6])
    assert_nats(rank_bound(2, [2, 3, 2], [3, 1, 4], "interleaved").exp(), [6, 8])


@pytest.mark.parametrize("rank", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("out_dims", "in_dims"), [([2] * 5, [2] * 5), ([3, 2, 5], [2, 2, 7]), ([2, 2, 2, 3], [5, 3]), ([11], [13])]
)
def test_the_bound_is_never_violated(out_dims, in_dims, rank):
    for order in ("row_major", "interleaved")[: 1 + (len(out_dims) == len(in_dims))]:
        bound = rank_bound(rank, out_dims, in_dims, order)
        for seed in range(3):
            M = low_rank(math.prod(out_dims), math.prod(in_dims), rank, seed)
            assert_at_most(internal_entropy(M, out_dims, in_dims, order).exp(), bound.exp())


def test_the_bound_is_reached():
    """By the identity, and by a column of equal entries on the diagonal of its digits, where a rank of 1 allows it."""
    assert_close(rank_bound(4, [2, 2], [2, 2]), internal_entropy(torch.eye(4)))
    column, row = torch.eye(2).reshape(4, 1), torch.eye(3).reshape(1, 9)
    bell = internal_entropy(column @ row, [2, 2], [3, 3], "interleaved")
    assert_close(rank_bound(1, [2, 2], [3, 3], "interleaved"), bell)
    assert_nats(bell, [math.log(6)])


def test_sites_are_primes_and_the_largest_come_first():
    assert [prime_sites(n) for n in (1, 2, 12, 768, 13)] == [(), (2,), (3, 2, 2), (3, *[2] * 8), (13,)]
    M = gaussian(12, 4)
    assert torch.equal(internal_entropy(M), internal_entropy(M, [3, 2, 2], [2, 2]))
    assert_apart(internal_entropy(M), internal_entropy(M, [2, 2, 3], [2, 2]))


def test_a_single_entry_has_no_cut():
    assert internal_entropy(torch.ones(1, 1)).shape == (0,)


def test_refusals():
    M = gaussian(4, 6)
    with refuses("shape_mismatch", match="in_dims 2 x 2 make 4, and that side of the matrix has 6") as error:
        internal_entropy(M, [2, 2], [2, 2])
    assert error.value.nearest == "3 x 2"
    with refuses("shape_mismatch", match="2 output sites cannot be interleaved with 1 input sites"):
        internal_entropy(M, [2, 2], [6], order="interleaved")
    with pytest.raises(lorac.OptionError, match="no order of sites 'row-major'") as unknown:
        internal_entropy(M, order="row-major")
    assert unknown.value.nearest == "row_major"
    with refuses("non_finite"):
        internal_entropy(M * torch.inf)
    with pytest.raises(AdapterError, match="zeros"):
        internal_entropy(torch.stack([M, 0 * M]))


def trained(method, host):
    """An adapter away from its start."""
    adapter = lorac.compile(host, {"a": method}).adapters["a"]
    with torch.no_grad():
        for index, tensor in enumerate(adapter.parameters()):
            tensor.copy_(gaussian(*tensor.shape, seed=index))
    return adapter


def oblong():
    return torch.nn.Sequential(torch.nn.Linear(12, 16, bias=False, dtype=torch.float64))


def test_an_adapter_is_measured_by_its_change():
    adapter = trained(lorac.LoRA(r=3, alpha=6, targets=["0"]), oblong())
    (profile,) = adapter_entanglement(adapter).values()
    delta = 2 * adapter.tensors["0"]["lora_B"] @ adapter.tensors["0"]["lora_A"]
    assert (profile.out_dims, profile.in_dims) == ((2, 2, 2, 2), (3, 2, 2))
    assert_nats(tensor(profile.entropies), internal_entropy(delta).tolist())
    assert_close(tensor(profile.spectrum), torch.linalg.svdvals(delta)[:3])
    assert_nats(tensor(profile.bounds), rank_bound(3, [2] * 4, [3, 2, 2]).tolist())
    assert profile.centre == profile.entropies[3]
    assert profile.humps == (max(profile.entropies[:3]), max(profile.entropies[4:]))
    assert profile.valley == min(profile.humps) - profile.centre > 0


def test_full_rank_has_a_peak_where_low_rank_has_a_valley():
    host = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False, dtype=torch.float64))
    (full,) = adapter_entanglement(trained(lorac.Full(targets=["0"]), host), host).values()
    assert full.valley < 0
    (low,) = adapter_entanglement(trained(lorac.LoRA(r=2, targets=["0"]), host), host).values()
    assert low.valley > 0 and low.centre <= LN2


def test_rejects_hira_without_the_base():
    host = oblong()
    adapter = trained(lorac.HiRA(r=2, targets=["0"]), host)
    with pytest.raises(lorac.BaseNeeded):
        adapter_entanglement(adapter)
    (profile,) = adapter_entanglement(adapter, host).values()
    product = adapter.tensors["0"]["hira_B"] @ adapter.tensors["0"]["hira_A"]
    assert_nats(tensor(profile.entropies), internal_entropy(host[0].weight * product).tolist())


def test_a_fresh_adapter_changes_nothing():
    adapter = lorac.compile(oblong(), {"a": lorac.LoRA(r=2, targets=["0"])}).adapters["a"]
    assert adapter_entanglement(adapter) == {"0": None}


@pytest.mark.medium("the numbers that it draws")
def test_a_picture(tmp_path):
    profiles = adapter_entanglement(trained(lorac.LoRA(r=3, targets=["0"]), oblong()))
    draw_entanglement({**profiles, "untouched": None}, tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text(encoding="utf-8")
    assert "singular value" in drawn and "untouched" not in drawn  # labels are comments of the file
    with pytest.raises(lorac.OptionError, match="does not write pictures as 'pgn'") as error:
        draw_entanglement(profiles, tmp_path / "picture.pgn")
    assert error.value.nearest == "png"
