"""AdaMSS: its groups against scikit-learn's and PEFT's, its start, and files whose base has other groups."""

import pytest
import torch
from peft import AdamssConfig, get_peft_model

import lorac
from lorac import AdaMSS
from lorac.testing import assert_close
from lorac.variants.adamss import cluster
from tests.peft_files import quiet, save_small
from tests.refusing import refuses
from tests.zoo import ZOO

SKLEARN = "0133000323332122223020000320230001121213"
"""KMeans(4, init="random", n_init=1, max_iter=10, random_state=123456789) of scikit-learn 1.9 on the points below."""


def _points(count, width):
    """Points that any machine has alike."""
    return torch.sin(torch.arange(count * width, dtype=torch.float64) ** 1.5).reshape(count, width)


def test_clusters_are_those_of_scikit_learn():
    assert "".join(map(str, cluster(_points(40, 3), 4).tolist())) == SKLEARN


def test_a_cluster_keeps_its_center_where_points_are_alike():
    assert set(cluster(torch.zeros(5, 2), 3).tolist()) == {0}


@pytest.mark.parametrize("dynamic", [False, True])
def test_groups_and_start_values_are_peft_s(dynamic):
    """With all directions of a group PEFT's random subspace is exact; the number of those above a share is."""
    fields = {"r": 8, "num_subspaces": 3, "subspace_rank": 20, "use_dynamic_rank": dynamic, "svd_threshold": 0.3}
    with quiet():
        config = AdamssConfig(target_modules=["up"], random_seed=4, **fields)
        layer = get_peft_model(ZOO["plain_mlp"].fresh(), config).base_model.model.up
    compiled = lorac.compile(ZOO["plain_mlp"].model(), {"a": AdaMSS(targets=("up",), random_seed=4, **fields)})
    tensors = compiled.adapters["a"].tensors["up"]
    groups, rows = tensors["adamss_groups"]
    basis = layer.adamss_newB["default"]
    assert torch.equal(rows, layer.scatter_index["default"])
    assert_close(tensors["adamss_newB"].abs(), basis.abs())  # signs are LAPACK's
    for number, theirs in enumerate(layer.adamss_A["default"]):
        ours = tensors["adamss_A"][number].detach()
        assert (groups == number).sum() == len(layer.adamss_B["default"][number])
        assert len(theirs) == int(ours.any(1).sum())
        if not dynamic:
            assert_close((ours[: len(theirs)] @ tensors["adamss_newB"]).abs(), (theirs.detach() @ basis).abs())


def test_rejects_a_base_with_other_groups(tmp_path):
    folder = save_small(tmp_path / "a", "ADAMSS")
    with refuses("base_needed", match="pass model="):
        lorac.load_adapter(folder)
    other = ZOO["plain_mlp"].fresh()
    with torch.no_grad():
        other.up.weight.copy_(_points(*other.up.weight.shape))
    with refuses("corrupt_file", match="the base's weight at 'up' gives other groups of rows than the file"):
        lorac.load_adapter(folder, other)


def test_rejects_groups_that_rounding_decides(tmp_path):
    model = ZOO["plain_mlp"].model()
    folder = save_small(tmp_path / "a", "ADAMSS", r=6, target_modules=["down"])
    with refuses("site_unsupported", match="all rows of 'down' are equally near .* 6 singular vectors"):
        lorac.load_adapter(folder, model)
    adapter = lorac.compile(model, {"a": AdaMSS(r=6, num_subspaces=3, targets=("down",))}).adapters["a"]
    with refuses("site_unsupported", match="r below 6"):
        lorac.save_adapter(adapter, tmp_path / "b", model=model)


def test_rejects_saving_groups_that_peft_would_not_make(tmp_path):
    model = ZOO["plain_mlp"].model()
    adapter = lorac.load_adapter(save_small(tmp_path / "a", "ADAMSS"), model)
    adapter.tensors["up"]["adamss_groups"] = adapter.tensors["up"]["adamss_groups"].flip(1)
    with refuses("unsupported_field", match="'adamss_groups' at 'up' is not the one that PEFT computes"):
        lorac.save_adapter(adapter, tmp_path / "b", model=model)
