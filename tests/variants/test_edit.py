"""Edits: every part at once, sites with their own parts, and changes of other methods in them."""

import pytest
import torch
from torch import nn

import lorac
from lorac.adapters.edits import hold_changes
from lorac.ir.algebra.changes import Delta, LowRank, Sparse, compose, merge_weight
from lorac.testing import HOSTS, adapter_away, assert_close, assert_parity, conformance
from tests.oracles import edit

WHOLE = lorac.Edit(parts={"pair": 2, "c": 1, "d": 1, "t": 1, "e": 1, "sparse": 5, "delta": 1})
SCALED = lorac.Edit(parts={"pair": 3, "c": 1, "e": 1})
TURNED = lorac.Edit(parts={"pair": 1, "t": 3})
LINEAR = {name: HOSTS[name] for name in ("linear", "divisible")}


@pytest.mark.medium("the formula, and the kit's other checks of other methods", keep=["*-formula*"])
@pytest.mark.slow(
    "layers of uneven sizes; test_holds_the_change_of_any_method, and the kit's there",
    cases=["edit-divisible-*", "*-live0", "*-merged0", "*-merged1"],
)
@pytest.mark.parametrize(
    "check",
    [check for variant in (WHOLE, SCALED, TURNED) for check in conformance(variant, edit, hosts=LINEAR)],
    ids=str,
)
def test_several_parts_at_once(check):
    check()


def made(variant):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double(), torch.randn(5, 6).double()
    return model, x, adapter_away(variant, model, x, name="a", seed=1)


BOTH = ("0", "2")


@pytest.mark.medium("two normal forms", keep=["lora", "shira"])
@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [
        lorac.LoRA(r=2, lora_bias=True, targets=BOTH),
        lorac.DoRA(r=2, targets=BOTH),
        lorac.IA3(targets=BOTH),
        lorac.OFT(block_size=3, targets=BOTH),
        lorac.SHiRA(r=1, targets=BOTH),
        lorac.LoKr(r=2, targets=BOTH),
        lorac.HiRA(r=2, targets=BOTH),
        lorac.VeRA(r=3, targets=BOTH),
    ],
    ids=lambda method: method.name,
)
def test_holds_the_change_of_any_method(method, tmp_path):
    model, x, adapter = made(method)
    weights = {path: model.get_submodule(path).weight.detach() for path in BOTH}
    held = hold_changes("held", lorac.factors(adapter, model), like=method, weight=weights.__getitem__)
    assert held.variant.name == ("lora" if method.name in {"lora", "vera"} else "edit")
    lorac.save_adapter(held, tmp_path / "held", format="native", model=model)
    again = lorac.load_adapter(tmp_path / "held", model)
    expected = lorac.compile(model, {"a": adapter})(x)
    assert_parity(lorac.compile(model, {"b": again})(x), expected, model(x))
    assert type(lorac.factors(held, model)["0"]) in {type(lorac.factors(adapter, model)["0"]), Delta}


@torch.no_grad()
def test_keeps_the_scale_of_a_sum():
    model, _, lora = made(lorac.LoRA(r=2, targets=BOTH))
    _, _, dora = made(lorac.DoRA(r=1, targets=BOTH))
    weight = model[0].weight
    change = compose([(0.7, lorac.factors(lora, model)["0"]), (-0.4, lorac.factors(dora, model)["0"])], lambda: weight)
    held = hold_changes("sum", {"0": change})
    assert held.variant.parts == {"pair": 3, "c": 1}
    again = lorac.factors(held)["0"]
    assert isinstance(again, LowRank)
    assert_close(merge_weight(again, weight), merge_weight(change, weight))


def test_sums_of_sparse_changes_name_each_position_once():
    rows, cols = torch.tensor([0, 1]), torch.tensor([2, 2])
    change = compose([(1.0, Sparse(rows, cols, torch.ones(2))), (2.0, Sparse(rows[:1], cols[:1], torch.ones(1)))], None)
    [at] = hold_changes("sum", {"0": change}).tensors.values()
    assert at["indices"].tolist() == [[0, 1], [2, 2]]
    assert at["values"].tolist() == [3.0, 1.0]


@torch.no_grad()
def test_returns_factors_without_the_base():
    _, _, adapter = made(lorac.Edit(targets=BOTH))
    for path, change in lorac.factors(adapter).items():
        assert isinstance(change, Delta)
        assert torch.equal(change.delta, adapter.tensors[path]["delta"])


def test_rejects_invalid_parts():
    with pytest.raises(lorac.OptionError, match=r"no part 'delt' of size 1\n.*delta"):
        lorac.Edit(parts={"delt": 1})
    with pytest.raises(lorac.OptionError, match="no part 'pair' of size 0"):
        lorac.Edit(by_site={"0": {"pair": 0}})
    with pytest.raises(lorac.SiteError, match="blocks of size 5 do not divide the 6 inputs of '0'"):
        lorac.compile(nn.Sequential(nn.Linear(6, 4)), {"a": lorac.Edit(parts={"t": 5}, targets=["0"])})
    with pytest.raises(lorac.BaseNeeded, match="depends on that weight"):
        hold_changes("a", lorac.factors(made(lorac.HiRA(r=2, targets=BOTH))[2], made(lorac.HiRA(targets=BOTH))[0]))
