"""Calls of a program: its inputs and outputs, and the errors of calls that do not fit."""

import pytest
import torch

import lorac
from lorac.frontend.capture.export import capture_graph
from lorac.frontend.host import Host
from lorac.frontend.site_discovery import find_sites
from lorac.ir.calls.interface import Interface
from tests.zoo import ZOO


def test_types_by_the_names_of_axes():
    model, inputs = ZOO["plain_mlp"].fresh(), ZOO["plain_mlp"].inputs()
    interface = capture_graph("main", Host.of(model), inputs, None, sites=find_sites(model), plans={}).interface
    (name,) = interface.inputs
    (output,) = interface.outputs
    assert interface.types[name] == "int64[batch, 5]"
    assert interface.types[output].startswith("float32[batch, ")
    assert Interface.from_json(interface.to_json()).types == interface.types


@pytest.mark.parametrize("entry", ["below", "spelled", "types", "derived", "spread", "fixed", "checks"])
def test_rejects_a_stored_table_that_is_a_list(entry):
    stored = Interface(inputs=("x",), outputs=("y",)).to_json() | {entry: []}
    with pytest.raises(lorac.ArtifactError, match="does not fit together"):
        Interface.from_json(stored)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("below", "5"), ("spelled", ["x"]), ("types", 3), ("derived", None), ("spread", {"a": "x"}), ("checks", ["y"])],
)
def test_rejects_other_values_of_a_stored_table(entry, value):
    stored = Interface(inputs=("x",), outputs=("y",), extra_outputs=("y",)).to_json() | {entry: {"x": value}}
    with pytest.raises(lorac.ArtifactError, match="does not fit together"):
        Interface.from_json(stored)


@pytest.mark.parametrize(
    ("name", "captured", "said"),
    [
        ("use_cache", False, "a program keeps no cache, target='eager' runs the model with its own"),
        ("output_attentions", False, "model.config.output_attentions, set before compiling, is what the program does"),
        ("scale", 1.0, "target='eager' runs the model itself, with any value"),
    ],
)
def test_rejects_other_values_of_captured_constants(name, captured, said):
    interface = Interface(inputs=("x",), arguments=("x", name), outputs=("y",), defaults={name: captured})
    with pytest.raises(lorac.InputMismatch, match=f"captured with {name}={captured}") as raised:
        interface.check(interface.bind((torch.ones(1),), {name: 7}))
    assert raised.value.next_step == f"leave it out; {said}"
    assert list(interface.check(interface.bind((torch.ones(1),), {name: captured}))) == ["x"]


@pytest.mark.medium("the other arguments of a call")
def test_suggested_next_steps_work():
    """What the messages suggest comes true."""
    entry = ZOO["tiny_llama"]
    model = entry.fresh()
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=1, targets=["q_proj"])})
    with torch.no_grad():
        assert compiled(**entry.inputs(), use_cache=True).past_key_values is not None
    model.config.output_hidden_states = True
    graph = capture_graph("main", Host.of(model), entry.inputs(), None, sites=find_sites(model), plans={})
    assert "hidden_states.0" in graph.interface.outputs


def test_only_arguments_for_further_arguments_may_be_empty():
    given = {"joint_attention_kwargs": {}, "mask": None, "added": {}, "other_kwargs": {"scale": 1}}
    assert Interface(inputs=("x",)).bind((), given).kwargs.keys() == {"added", "other_kwargs"}


def test_an_argument_that_holds_several_tensors_is_as_many_inputs():
    paths = {"pair[0]": "pair_0", "pair[1]['b']": "pair_1_b"}
    interface = Interface(inputs=(*paths.values(), "x"), arguments=("pair", "x"), outputs=("y",), aliases=paths)
    one, other, x = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    bound = interface.bind(([one, {"b": other, "c": None}], x), {}).kwargs
    assert [bound[name] is tensor for name, tensor in (("pair_0", one), ("pair_1_b", other), ("x", x))] == [True] * 3
    with pytest.raises(
        lorac.InputMismatch, match="'pair' holds 3 tensors; the program was captured for pair_0, pair_1_b"
    ):
        interface.bind(([one, {"b": other}, x], x), {})
