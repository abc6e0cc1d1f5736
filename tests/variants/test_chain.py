"""Chains by hand, and of adapters that were trained apart."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case, assert_close, conformance
from lorac.testing.eager_checks import check_identity_at_init
from lorac.variants.params import select_params
from tests.limits import assert_apart
from tests.oracles import chain as oracle
from tests.refusing import refuses

CHECKS = conformance(lorac.Chain(parts=(lorac.LoRA(r=3, alpha=5), lorac.DoRA(r=1, alpha=2))), oracle)


@pytest.mark.medium(
    "the formula, and the kit's other checks of other methods",
    keep=["chain-linear-formula", "chain-embedding-formula", "chain-linear-swapping"],
)
@pytest.mark.slow(
    "the kit's hosts of one layer, and chains end to end",
    cases=["*-transposed-*", "*-padded-*", "*-two_*", "*-onnxruntime-*"],
)
@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_conforms(check):
    check()


def adapted(W, adapter, path="site"):
    return adapter.variant.weight(W, SimpleNamespace(**adapter.tensors[path]))


@torch.no_grad()
def test_two_bats_by_hand():
    """W=[[1,2],[3,4]] and b=[[0,1],[0,0]] give [[1,4],[3,7]]; b again on that gives [[1,6],[3,10]]."""
    block = torch.tensor([[[0.0, 1], [0, 0]]])
    chain = lorac.Chain(parts=(lorac.BAT(r=2), lorac.BAT(r=2)))
    p = SimpleNamespace(**{"part0_miss_block": block, "part1_miss_block": block})
    assert chain.weight(torch.tensor([[1.0, 2], [3, 4]]), p).tolist() == [[1, 6], [3, 10]]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
def test_each_part_edits_the_weight_of_the_part_before(mode):
    case = Case(lorac.BAT(r=3), HOSTS["divisible"])
    chained = lorac.Chain.of(case.a, case.b, name="both")
    W = adapted(adapted(case.weight, case.a), case.b)
    expected = torch.nn.functional.linear(case.x, W, case.bias)
    assert_close(case.compiled(chained, mode=mode)(case.x), expected)
    other = lorac.Chain.of(case.b, case.a, name="both")
    assert_apart(case.compiled(other, mode=mode)(case.x), expected)


@torch.no_grad()
def test_a_strength_scales_the_whole_chain():
    case = Case(lorac.BAT(r=3), HOSTS["divisible"])
    compiled = case.compiled(lorac.Chain.of(case.a, case.b, name="both"))
    half = compiled(case.x, adapters={"both": 0.5})
    assert_close(half, (compiled(case.x) + case.base(case.x)) / 2)


def test_scales_and_low_rank_parts_stay_low_rank():
    """diag(m/n)·(W + BA) after W + BA reads W for its norms alone."""
    host = nn.Sequential(nn.Linear(32, 48))
    parts = (lorac.LoRA(r=2), lorac.DoRA(r=2), lorac.IA3())
    compiled = lorac.compile(host, {"a": lorac.Chain(parts=parts, targets=("0",))})
    value = compiled.pool["a"].changes["0"]
    assert isinstance(value, LowRank)
    assert value.rank == 4
    assert "c" in value.scales


@torch.no_grad()
def test_a_part_is_initialised_from_the_weight_of_the_parts_before():
    host, moving = nn.Sequential(nn.Linear(6, 4)), lorac.FourierFT(n_frequency=5)
    chain = lorac.Chain(parts=(moving, lorac.Magnitude()), targets=("0",))
    own = lorac.compile(host, {"a": chain}).adapters["a"].tensors["0"]
    moved = moving.weight(host[0].weight, select_params(SimpleNamespace(**own), "part0_"))
    assert_close(own["part1_magnitude"], torch.linalg.vector_norm(moved, dim=1))


def two_layers():
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))


@torch.no_grad()
def test_of_adapters_on_different_sites(tmp_path):
    """A path that ends as another's, "0" and "2.0", is another site."""
    model, x = two_layers(), torch.randn(4, 6)
    first = lorac.compile(model, {"f": lorac.BAT(r=2, targets=r"0|1")}).adapters["f"]
    second = lorac.compile(model, {"s": lorac.VeRA(r=2, targets=r"0|2\.0")}).adapters["s"]
    for tensor in (*first.parameters(), *second.parameters()):
        if tensor.requires_grad:
            tensor.normal_(std=0.3)
    chained = lorac.Chain.of(first, second, name="both")
    assert {path: sorted({key[:5] for key in at}) for path, at in chained.tensors.items()} == {
        "0": ["part0", "part1"],
        "1": ["part0"],
        "2.0": ["part1"],
    }
    for path, parts in {"0": (first, second), "1": (first,), "2.0": (second,)}.items():
        weight = model.get_submodule(path).weight
        expected = weight
        for part in parts:
            expected = adapted(expected, part, path)
        found = lorac.compile(model, {"a": chained}, mode="baked").host.get_submodule(path).weight
        assert_close(found, expected)
    lorac.save_adapter(chained, tmp_path / "chain.safetensors", format="native", model=model)
    again = lorac.load_adapter(tmp_path / "chain.safetensors", model)
    assert again.variant == chained.variant
    expected = lorac.compile(model, {"a": chained})(x)
    assert torch.equal(lorac.compile(model, {"a": again})(x), expected)


def test_a_fresh_chain_initialises_its_parts_in_order():
    """DoRA's magnitudes are the norms of what the part before it leaves."""
    model = two_layers()
    parts = (lorac.LoRA(r=2, targets="0"), lorac.DoRA(r=2))
    adapter = lorac.compile(model, {"a": lorac.Chain(parts=parts, targets="0|1")}).adapters["a"]
    assert {path: {key[:5] for key in at} for path, at in adapter.tensors.items()} == {
        "0": {"part0", "part1"},
        "1": {"part1"},
    }
    assert_close(adapter.tensors["0"]["part1_magnitude"].detach(), model[0].weight.detach().norm(dim=1))


def test_a_chain_starts_as_the_base_if_all_its_parts_do():
    check_identity_at_init(Case(lorac.Chain(parts=(lorac.LoRA(r=1), lorac.FourierFT(n_frequency=5))), HOSTS["linear"]))


def test_rejects_methods_that_do_not_edit_a_weight():
    model = two_layers()
    made = {"hydra": lorac.Hydra(targets=("0",)), "lora": lorac.LoRA(targets=("0",))}
    adapters = lorac.compile(model, made).adapters
    with refuses("not_mergeable", match=r"'hydra' \(hydra\) does not edit a weight"):
        lorac.Chain.of(adapters["lora"], adapters["hydra"], name="x")


def test_rejects_parts_that_do_not_edit_a_weight():
    with pytest.raises(lorac.OptionError, match="made of methods that edit weights, and Hydra"):
        lorac.Chain(parts=(lorac.LoRA(), lorac.Hydra()))


def test_rejects_two_copies_of_a_module():
    model = two_layers()
    made = {name: lorac.LoRA(targets=("0",), modules_to_save=("1",)) for name in "ab"}
    adapters = lorac.compile(model, made).adapters
    with pytest.raises(lorac.ChoiceError, match=r"'b' replaces '1\.bias', and so does an adapter before it"):
        lorac.Chain.of(adapters["a"], adapters["b"], name="x")
