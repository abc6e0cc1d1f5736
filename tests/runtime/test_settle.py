"""Settling: bound weights re-baked as constants; a weight state of its own, entered only when asked."""

import time

import pytest

import lorac
from lorac.cli._generation import time_choices
from tests.runtime.switching import CHOICES, CYCLE, answer, build, fresh, key, pair, raw


@pytest.fixture(scope="module")
def fused():
    return build(pair("lora", "shira"), "onnxruntime", "fused")


@pytest.fixture(scope="module")
def expected():
    """The outputs of fresh compilations, settled and bound, by choice."""
    compiled = {key(c): fresh(pair("lora", "shira"), "onnxruntime", "fused", c) for c in CHOICES}
    bound = {name: raw(answer(model)) for name, model in compiled.items()}
    for choice in CHOICES:
        assert compiled[key(choice)].swap(choice, settle=True).state == "settled"
    return {"bound": bound, "settled": {name: raw(answer(model)) for name, model in compiled.items()}}


@pytest.mark.medium("test_in_the_background compares with a settled compile")
def test_settled_has_the_bits_of_a_fresh_settled_compile(fused, expected):
    for choice in CYCLE * 3:
        assert fused.swap(choice, settle=True).state == "settled"
        assert fused.engine.is_settled
        assert raw(answer(fused)) == expected["settled"][key(choice)]


def test_does_not_settle_by_default(fused, expected):
    """Also where the same choice was settled before."""
    assert fused.swap("a", settle=True).state == "settled"
    assert fused.swap("b").state == "bound"
    assert raw(answer(fused)) == expected["bound"]["b"]
    assert fused.swap("a").state == "bound"
    assert not fused.engine.is_settled
    assert raw(answer(fused)) == expected["bound"]["a"]


def test_explain_suggests_settle_for_fused_weights(fused):
    assert "swap(..., settle=True) makes constants of the choice's" in str(fused.explain())
    assert "settle=True" not in str(build(pair("lora", "shira"), "onnxruntime", "live").explain())
    fused.swap(None)
    times = time_choices(fused, 1, lambda **choice: (), settle=True)
    assert times.keys() == {None, *fused.adapters}
    assert fused.engine.is_settled


def test_a_choice_for_one_call_keeps_settled_weights(fused, expected):
    fused.swap("a", settle=True)
    assert raw(answer(fused, adapters="b")) == expected["bound"]["b"]
    assert fused.engine.is_settled
    assert raw(answer(fused)) == expected["settled"]["a"]


def test_in_the_background(expected):
    compiled = build(pair("lora", "shira"), "onnxruntime", "fused", settle="background")
    compiled.swap("b")
    deadline = time.monotonic() + 30
    while not compiled.engine.is_settled and time.monotonic() < deadline:
        assert raw(answer(compiled)) in {expected["bound"]["b"], expected["settled"]["b"]}
    assert compiled.engine.is_settled
    assert raw(answer(compiled)) == expected["settled"]["b"]


@pytest.mark.medium("eager", cases=["onnxruntime-live"])
@pytest.mark.parametrize(("target", "mode"), [("eager", "live"), ("eager", "fused"), ("onnxruntime", "live")])
def test_rejects_settle_without_fused_weights(target, mode):
    compiled = build(pair("lora", "hydra"), target, mode)
    compiled.swap("a")
    before = answer(compiled)
    with pytest.raises(lorac.Unavailable, match="settle"):
        compiled.swap("b", settle=True)
    assert compiled.active == {"a": 1.0}
    assert raw(answer(compiled)) == raw(before)


def test_an_unknown_setting():
    with pytest.raises(lorac.OptionError, match="background"):
        build([], "onnxruntime", settle="later")


def test_settling_changes_no_file_of_the_artifact(fused, expected, tmp_path):
    fused.swap("a")
    fused.save(tmp_path / "saved")
    files = {path: path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    loaded = lorac.load(tmp_path / "saved")
    loaded.swap("a", settle=True)
    assert raw(answer(loaded)) == expected["settled"]["a"]
    assert {path: path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()} == files
    assert raw(answer(lorac.load(tmp_path / "saved"))) == expected["bound"]["a"]
