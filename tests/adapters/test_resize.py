"""Other ranks of a LoRA: lower ones lose the tail of its singular values, higher ones nothing."""

import numpy as np
import pytest
import torch

import lorac
from lorac.testing import assert_close
from tests.refusing import refuses

SHAPES = {"a": (9, 6), "b.c": (4, 9)}


def lora(**fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tensors = {
            path: {"lora_A": torch.randn(3, columns).double(), "lora_B": torch.randn(out, 3).double()}
            for path, (out, columns) in SHAPES.items()
        }
    return lorac.Adapter("x", lorac.LoRA(r=3, targets=tuple(SHAPES), **fields), tensors)


def deltas(adapter):
    return {
        path: adapter.variant.at_path(path).scale * (at["lora_B"] @ at["lora_A"]).numpy()
        for path, at in adapter.tensors.items()
    }


@pytest.mark.parametrize("fields", [{"alpha": 5.0}, {"alpha": -2.0}, {"alpha": 4.0, "rslora": True}], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3, 7])
def test_a_rank(rank, fields):
    adapter = lora(**fields)
    resized = lorac.resize(adapter, rank)
    for path, delta in deltas(adapter).items():
        s = np.linalg.svd(delta, compute_uv=False)
        u, _, vh = np.linalg.svd(delta, full_matrices=False)
        assert_close(torch.tensor(deltas(resized)[path]), torch.tensor((u * s)[:, :rank] @ vh[:rank]))
        error = torch.tensor(resized.provenance["errors"][path], dtype=torch.float64)
        assert_close(error, torch.tensor(np.linalg.norm(s[rank:3]) / np.linalg.norm(s)))
        assert resized.tensors[path]["lora_A"].shape == (rank, SHAPES[path][1])
        scales = [torch.tensor(one.variant.at_path(path).scale) for one in (resized, adapter)]
        assert_close(*scales)


def test_new_columns_can_learn():
    at = lorac.resize(lora(), 5).tensors["a"]
    assert not at["lora_B"][:, 3:].any()
    assert_close(torch.linalg.vector_norm(at["lora_A"][3:], dim=1), torch.ones(2).double())


def test_a_tolerance_finds_the_rank_of_each_site():
    adapter = lora()
    resized = lorac.resize(adapter, tolerance=0.4)
    for path, delta in deltas(adapter).items():
        s = np.linalg.svd(delta, compute_uv=False)
        tails = [np.linalg.norm(s[k:]) / np.linalg.norm(s) for k in range(4)]
        assert len(resized.tensors[path]["lora_A"]) == next(k for k, share in enumerate(tails) if share <= 0.4)


def test_keeps_a_change_of_zero():
    for adapter in (lora(alpha=0.0), lora()):
        adapter.tensors["a"]["lora_B"].zero_()
        assert not deltas(lorac.resize(adapter, 2))["a"].any()


def test_refusals():
    with refuses("not_mergeable", match=r"rank 1 leaves out 0.\d+ of the change of 'a' by 'x', more than"):
        lorac.resize(lora(), 1, tolerance=0.01)
    with pytest.raises(lorac.OptionError, match="a resize needs rank= or tolerance="):
        lorac.resize(lora())
    with refuses("adapter_error", match="which is not LoRA"):
        lorac.resize(lorac.Adapter("x", lorac.Edit()), 1)
