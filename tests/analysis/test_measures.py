"""Adapters in numbers, by NumPy in float64 on the whole matrices."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import lorac
from lorac.ir.algebra.changes import merge_weight
from lorac.testing import adapter_away, assert_close
from tests.refusing import refuses

BOTH = ("0", "2")


def made(variant, name="a", seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double(), torch.randn(5, 6).double()
    return model, adapter_away(variant, model, x, name=name, seed=seed)


def deltas(adapter, model):
    found = {}
    for path, change in lorac.factors(adapter, model).items():
        weight = model.get_submodule(path).weight.detach()
        found[path] = (merge_weight(change, weight) - weight).numpy(), weight.numpy()
    return found


def assert_number(found, expected):
    assert_close(torch.tensor(found, dtype=torch.float64), torch.tensor(float(expected), dtype=torch.float64))


@pytest.mark.parametrize(
    ("method", "form"),
    [
        (lorac.LoRA(r=3, targets=BOTH), "low-rank"),
        (lorac.DoRA(r=2, targets=BOTH), "low-rank"),
        (lorac.SHiRA(r=1, targets=BOTH), "sparse"),
        (lorac.Edit(targets=BOTH), "delta"),
        (lorac.HiRA(r=2, targets=BOTH), "dense"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_each_site(method, form):
    model, adapter = made(method)
    found = lorac.inspect(adapter, model)
    assert found.mismatches == ()
    for path, (delta, weight) in deltas(adapter, model).items():
        site, s = found.sites[path], np.linalg.svd(delta, compute_uv=False)
        assert (site.form, site.rank) == (form, np.linalg.matrix_rank(delta, tol=s[0] / 1e9))
        assert_number(site.norm, np.linalg.norm(delta))
        assert_number(site.share, np.linalg.norm(delta) / np.linalg.norm(weight))
        shares = s[: site.rank] / s[: site.rank].sum()
        assert_number(site.effective_rank, np.exp(-(shares * np.log(shares)).sum()))


def test_without_the_model():
    """Factors tell all; a scale of the weight leaves the norm open, and a change of the whole weight everything."""
    model, adapter = made(lorac.LoRA(r=3, targets=BOTH))
    alone, known = lorac.inspect(adapter), lorac.inspect(adapter, model)
    assert alone.sites == {path: dataclasses.replace(site, share=None) for path, site in known.sites.items()}
    scaled = made(lorac.Edit(parts={"pair": 2, "c": 1}, targets=BOTH))[1]
    assert lorac.inspect(scaled).sites["0"] == lorac.analysis.measures.SiteMeasures("low-rank", 2)
    assert lorac.inspect(made(lorac.HiRA(targets=BOTH))[1]).sites["0"] == lorac.analysis.measures.SiteMeasures()
    branch = made(lorac.MeteoRA(r=2, targets=BOTH))[1]
    assert lorac.inspect(branch, model).sites["0"].form == "branch"


def test_everything_that_does_not_fit():
    _, adapter = made(lorac.LoRA(r=3, targets=BOTH))
    adapter.replaced["4.weight"] = torch.ones(3)
    other = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(8, 4))
    found = lorac.inspect(adapter, other)
    assert [text.split(",")[0] for text in found.mismatches] == [
        ["adapter 'a': lora_A at '2' has shape (3", " 9)"][0],
        "adapter 'a' replaces '4.weight'",
    ]
    assert found.sites["0"].share is not None
    assert (found.sites["2"].rank, found.sites["2"].share) == (3, None)


PAIRS = {
    "two ranks": (lorac.LoRA(r=3, targets=BOTH), lorac.LoRA(r=1, alpha=4, targets=BOTH)),
    "two methods": (lorac.LoRA(r=2, targets=BOTH), lorac.DoRA(r=2, targets=BOTH)),
    "two dense ones": (lorac.HiRA(r=1, targets=BOTH), lorac.Edit(targets=BOTH)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("rank", [None, 1])
def test_two_adapters(pair, rank):
    (model, one), (_, other) = made(PAIRS[pair][0], "a", 1), made(PAIRS[pair][1], "b", 2)
    found = lorac.diff(one, other, model, rank=rank)
    assert list(found) == [*BOTH]
    for path, (first, _) in deltas(one, model).items():
        second, _ = deltas(other, model)[path]
        norms = np.linalg.norm(first), np.linalg.norm(second)
        assert_number(found[path].first, norms[0])
        assert_number(found[path].second, norms[1])
        assert_number(found[path].difference, np.linalg.norm(first - second))
        assert_number(found[path].cosine, (first * second).sum() / norms[0] / norms[1])
        parts = [np.linalg.svd(delta) for delta in (first, second)]
        ranks = [rank or int((s > s[0] / 1e9).sum()) for _, s, _ in parts]
        outputs = np.linalg.svd(parts[0][0][:, : ranks[0]].T @ parts[1][0][:, : ranks[1]], compute_uv=False)
        inputs = np.linalg.svd(parts[0][2][: ranks[0]] @ parts[1][2][: ranks[1]].T, compute_uv=False)
        for cosines, expected, overlap in zip(
            (found[path].outputs, found[path].inputs), (outputs, inputs), found[path].overlap, strict=True
        ):
            assert_close(torch.tensor(cosines, dtype=torch.float64), torch.from_numpy(expected.clip(max=1)))
            assert_number(overlap, np.mean(expected**2))


def test_an_adapter_and_itself():
    _, adapter = made(lorac.LoRA(r=2, lora_bias=True, targets=BOTH))
    model = made(lorac.LoRA(targets=BOTH))[0]
    for site in lorac.diff(adapter, adapter, model).values():
        assert site.bias == 0
        assert_number(site.cosine, 1)
        assert_number(sum(site.overlap), 2)


def test_compares_replaced_parameters_and_sites_of_one_adapter_only():
    _, one = made(lorac.LoRA(r=2, targets=BOTH))
    _, other = made(lorac.LoRA(r=2, targets=("0",)), "b")
    one.replaced["2.bias"], other.replaced["2.bias"] = torch.ones(4), torch.zeros(4)
    found = lorac.diff(one, other)
    assert (found["2"].second, found["2"].difference, found["2"].outputs) == (None, None, ())
    assert found["2"].first > 0
    assert_number(found["2.bias"].difference, 2)


def test_refusals():
    model, one = made(lorac.LoRA(r=2, targets=("0",)))
    _, other = made(lorac.LoRA(r=2, targets=("2",)), "b")
    with refuses("site_not_found", match="'a' and 'b' touch no site in common"):
        lorac.diff(one, other, model)
    other = lorac.Adapter("b", one.variant, {"0": {"lora_A": torch.ones(2, 7), "lora_B": torch.ones(9, 2)}})
    with refuses("shape_mismatch", match=r"different layers at '0': \(9, 6\) and \(9, 7\)"):
        lorac.diff(one, other)
    with pytest.raises(lorac.BaseNeeded):
        lorac.diff(one, made(lorac.DoRA(r=1, targets=("0",)), "b")[1])
    with pytest.raises(lorac.WrongType, match=r"an adapter of lorac\.diff"):
        lorac.diff(one, "path")
    with pytest.raises(lorac.WrongType, match=r"the adapter of lorac\.inspect"):
        lorac.inspect("path")
