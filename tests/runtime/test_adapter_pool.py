"""Adding and removing at run time: adapters that fit, and the reserve that admits the others."""

import re
from dataclasses import dataclass

import pytest
import torch

import lorac
from lorac import ParamSpec
from lorac.session.adapter_tensors import state_dict_key
from lorac.testing import assert_close
from tests.refusing import refuses
from tests.runtime.switching import ENTRY, X, adapter, answer, build, pair, raw

TARGETS = ("eager", "onnxruntime")
ROOM = lorac.Reserve(targets=("up", "down", "head"), rank=4, adapters=2, scales=True)


@dataclass(frozen=True, kw_only=True)
class Bottleneck(lorac.BranchVariant):
    """``y' = y + U·tanh(D·x)``: no slot for it can be reserved."""

    name = "narrow"

    def params(self, site):
        return {
            "down": ParamSpec((2, site.in_features), lambda context: torch.ones(context.shape)),
            "up": ParamSpec((site.out_features, 2), lambda context: torch.ones(context.shape)),
        }

    def branch(self, x, y, p, ctx):
        return y + torch.tanh(x @ p.down.T) @ p.up.T


def advised(error: lorac.NeedsRecompile) -> lorac.Reserve:
    """The reserve that a message prints."""
    found = re.search(r"reserve=(lorac\.Reserve\(.*?\))(?:,|$)", str(error), re.MULTILINE)
    assert found, str(error)
    return eval(found[1], {"lorac": lorac})


@pytest.mark.medium("live there, and fused weights in eager", cases=["onnxruntime-fused"])
@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("target", TARGETS)
def test_added_removed_and_added_again(target, mode):
    """The bits of a model that had nothing else, whatever came and went."""
    compiled = build([], target, mode, reserve=ROOM)
    base = answer(compiled)
    assert compiled.adapters == {}
    assert compiled.add_adapter(adapter("dora", "a")) == "a"
    assert raw(answer(compiled)) == raw(base), "adding activates nothing"
    assert compiled.add_adapter(adapter("lora", "a"), name="b") == "b"
    assert list(compiled.adapters) == ["a", "b"]
    compiled.swap("a")
    first = answer(compiled)
    compiled.swap({"a": 0.5, "b": 0.5})
    compiled.remove_adapter("a")
    assert compiled.active == {"b": 0.5}
    assert raw(answer(compiled)) == raw(answer(compiled, adapters={"b": 0.5}))
    compiled.add_adapter(adapter("dora", "a"))
    compiled.swap("a")
    assert raw(answer(compiled)) == raw(first) != raw(base)
    compiled.remove_adapter("a")
    assert compiled.active == {}
    assert raw(answer(compiled)) == raw(base)


def test_a_reused_name_means_the_new_adapter():
    compiled = build([adapter("lora", "a")], "eager")
    before = answer(compiled, adapters="a")
    compiled.remove_adapter("a")
    compiled.add_adapter(adapter("lora_small", "a"))
    assert raw(answer(compiled, adapters="a")) == raw(answer(build([adapter("lora_small", "a")], "eager")))
    assert raw(answer(compiled, adapters="a")) != raw(before)


@pytest.mark.medium("one of each mode; LoRA, live", keep=["lora-live"])
@pytest.mark.parametrize(
    ("method", "mode"),
    [
        *((method, "live") for method in ("lora", "lora_large", "dora_large", "shira", "hydra")),
        *((method, "fused") for method in ("lora", "hydra", "shira")),
    ],
)
def test_rejects_an_adapter_and_names_the_reserve_that_admits_it(method, mode):
    """And following the advice works."""
    compiled = build([adapter("lora_small", "a")], "eager", mode)
    before, names = answer(compiled), list(compiled.state_dict())
    wanted = adapter(method, "b")
    with pytest.raises(lorac.NeedsRecompile, match="adapter 'b' does not fit: '") as caught:
        compiled.add_adapter(wanted)
    assert list(compiled.adapters) == ["a"], "nothing is registered"
    assert list(compiled.state_dict()) == names
    assert raw(answer(compiled)) == raw(before)
    again = build([adapter("lora_small", "a")], "eager", mode, reserve=advised(caught.value))
    again.add_adapter(wanted)
    again.swap("b")
    direct = build([wanted], "eager", mode)
    assert_close(answer(again), answer(direct))


@pytest.mark.medium("eager mode's eight cases")
def test_onnxruntime_names_the_reserve_too():
    compiled = build([adapter("lora_small", "a")], "onnxruntime")
    with pytest.raises(lorac.NeedsRecompile) as caught:
        compiled.add_adapter(adapter("dora_large", "b"))
    again = build([adapter("lora_small", "a")], "onnxruntime", reserve=advised(caught.value))
    again.add_adapter(adapter("dora_large", "b"))
    assert raw(answer(again, adapters="b")) != raw(answer(again, adapters=None))


def test_rejects_a_mixture_and_names_the_reserve_that_admits_it():
    few = lorac.Reserve(targets=("up", "down", "head"), rank=4, scales=True)
    compiled = build([], "eager", reserve=few)
    compiled.add_adapter(adapter("lora", "a"))
    compiled.add_adapter(adapter("dora_large", "b"))
    with pytest.raises(lorac.NeedsRecompile, match="does not fit together") as caught:
        compiled.swap({"a": 0.7, "b": 0.3})
    again = build([], "eager", reserve=advised(caught.value))
    again.add_adapter(adapter("lora", "a"))
    again.add_adapter(adapter("dora_large", "b"))
    again.swap({"a": 0.7, "b": 0.3})
    assert again.active == {"a": 0.7, "b": 0.3}


def test_no_reserve_admits_a_branch():
    compiled = build([adapter("lora_small", "a")], "eager")
    with pytest.raises(lorac.NeedsRecompile) as caught:
        compiled.add_adapter(Bottleneck(targets=("up",)), name="b")
    assert "reserve=" not in str(caught.value)
    assert "adapters=" in str(caught.value)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    """Two adapters, called sql and style; tests leave it as it is."""
    made = build({"sql": adapter("lora", "a"), "style": adapter("hydra", "b")}, "eager")
    made.swap("sql")
    return made


def test_rejects_a_taken_name(compiled):
    with refuses("adapter_exists", match="'sql'"):
        compiled.add_adapter(adapter("lora", "a"), name="sql")
    assert list(compiled.adapters) == ["sql", "style"]


def test_compile_rejects_duplicate_names():
    with refuses("adapter_exists", match="'a'"):
        build([adapter("lora", "a"), adapter("shira", "a")], "eager")


@pytest.mark.parametrize("use", ["swap", "remove_adapter", "call"])
def test_an_unknown_name_gets_the_nearest(compiled, use):
    before = answer(compiled)
    with pytest.raises(lorac.AdapterNotFound, match="'sqll'\n  nearest: sql"):
        answer(compiled, adapters="sqll") if use == "call" else getattr(compiled, use)("sqll")
    assert compiled.active == {"sql": 1.0}
    assert raw(answer(compiled)) == raw(before)


def test_a_removed_name_is_unknown():
    compiled = build(pair("lora", "hydra"), "eager")
    compiled.remove_adapter("b")
    assert not any("adapter_tensors.b" in name for name in compiled.state_dict())
    for use in (
        lambda: compiled.swap("b"),
        lambda: compiled.remove_adapter("b"),
        lambda: answer(compiled, adapters="b"),
    ):
        with pytest.raises(lorac.AdapterNotFound, match="no adapter is called 'b'"):
            use()


ODD = ["items", "update", "half", "type", "training", "items~", "a.b", "a/b", "a~1b", "a//b", "..", "日 本", "x" * 300]


@pytest.mark.medium("eager", cases=["onnxruntime"])
@pytest.mark.parametrize("target", TARGETS)
def test_any_text_is_a_name(target, tmp_path):
    """Also what torch keeps for itself, and texts that a simpler spelling would confuse."""
    example = {} if target == "onnxruntime" else {"example_inputs": {"tokens": X}}
    compiled = build([adapter("lora", "a")], target, **example)
    wanted = raw(answer(compiled, adapters="a"))
    for name in ODD:
        compiled.add_adapter(adapter("lora", "a"), name=name)
    assert list(compiled.adapters) == ["a", *ODD]
    compiled.save(tmp_path / "it")
    loaded = lorac.load(tmp_path / "it")
    loaded_wanted = raw(answer(loaded, adapters="a"))
    for name in ODD:
        compiled.swap(name)
        assert raw(answer(compiled)) == wanted
        assert raw(answer(loaded, adapters=name)) == loaded_wanted
        compiled.remove_adapter(name)
    assert list(compiled.adapters) == ["a"]


@pytest.mark.parametrize("name", ["", "\ud800"])
def test_rejects_invalid_names_and_changes_nothing(name):
    compiled = build([adapter("lora", "a")], "eager")
    names = list(compiled.state_dict())
    for add in (
        lambda: compiled.add_adapter(adapter("lora", "a"), name=name),
        lambda: build({name: adapter("lora", "a")}, "eager"),
    ):
        with pytest.raises(lorac.AdapterError, match="cannot be called"):
            add()
    assert list(compiled.state_dict()) == names


def test_state_dict_keys_are_unique():
    keys = {state_dict_key(name) for name in ODD}
    assert len(keys) == len(ODD)
    assert not any("." in key for key in keys)
    assert state_dict_key("sql-2") == "sql-2"
    assert state_dict_key("a.b") == "a/b"


def test_loads_a_state_dict_into_another_model():
    adapters = {"a.b": adapter("lora", "a"), "items": adapter("hydra", "b")}
    one, other = (lorac.compile(ENTRY.fresh(), adapters) for _ in range(2))
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    assert raw(answer(one, adapters="items")) != raw(answer(other, adapters="items"))
    other.load_state_dict(one.state_dict())
    for name in ("a.b", "items"):
        assert raw(answer(one, adapters=name)) == raw(answer(other, adapters=name))


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_rejects_a_cast_of_a_compiled_model(mode):
    compiled = build([adapter("lora", "a")], "eager", mode)
    compiled.swap("a")
    before = raw(answer(compiled))
    assert raw(answer(compiled.to("cpu"))) == before
    with pytest.raises(lorac.Unavailable, match="dtype="):
        compiled.to(torch.float64)
    assert raw(answer(compiled)) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "lvie"}, "no mode 'lvie'\n  nearest: live"),
        ({"target": "onnxruntme"}, "no target 'onnxruntme'\n  nearest: onnxruntime"),
        ({"auxx": ("router",)}, "no option 'auxx'\n  nearest: aux"),
        ({"target": "onnxruntime", "thread": 1}, "no option 'thread'\n  nearest: threads"),
        ({"reserve": lorac.Reserve(targets="upp")}, "upp"),
        ({"active": "b"}, "no adapter is called 'b'"),
        ({"active": {"a": float("nan")}}, "not finite"),
    ],
    ids=str,
)
def test_a_typo_in_compile(options, message):
    with pytest.raises(lorac.LoracError, match=re.escape(message)):
        lorac.compile(ENTRY.model(), [adapter("lora", "a")], **{"target": "eager", **options})


@torch.no_grad()
@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("name", ["lora", "dora", "vera"])
def test_writes_that_torch_does_not_count_are_seen(name, mode):
    """Through ``.data``, as research optimizers and moving averages write."""
    made = lorac.VeRA(r=3, targets=("up", "down")) if name == "vera" else adapter(name, "a")
    compiled = build([made], "eager", mode, active=made.name)
    before = answer(compiled)
    for _ in range(2):
        for tensor in compiled.adapters[made.name].parameters():
            tensor.data.add_(0.1)
        after = answer(compiled)
        assert raw(after) != raw(before)
        assert raw(after) == raw(answer(build([compiled.adapters[made.name]], "eager", mode, active=made.name)))
        before = after
