"""A branch that is off is not computed."""

import onnx_ir as ir
import pytest
import torch

import lorac
from lorac.backends.onnx.model_files import MODEL_FILE
from lorac.testing import HOSTS, Case

VARIANTS = {"adaptertune": (lorac.AdapterTune(r=2), "block"), "meteora": (lorac.MeteoRA(r=2, experts=3), "linear")}


@pytest.fixture(scope="module", params=VARIANTS)
def case(request):
    variant, host = VARIANTS[request.param]
    return Case(variant, HOSTS[host])


@pytest.fixture(scope="module")
def compiled(case):
    adapters = {"a": case.a, "b": case.b}
    x = case.x.float()
    return lorac.compile(case.model32, adapters, target="onnxruntime", example_inputs=(x,), active=None)


def test_each_branch_lies_in_an_if_of_its_own(compiled):
    model = ir.load(compiled.engine.folder / MODEL_FILE)
    gates = [node for node in model.graph if node.op_type == "If"]
    assert len(gates) == len(compiled.plans["blocks.0" if "blocks.0" in compiled.plans else "site"].branches) == 2
    parameters = {name for name, slot in compiled.engine.slots.items() if ".t" not in slot.role}
    outside = {value.name for node in model.graph for value in node.inputs if value is not None}
    assert not parameters & outside, "a branch's parameters are read where it is off"


def test_an_idle_branch_leaves_the_bases_bits_whatever_its_parameters_hold(case, compiled):
    x = case.x.float()
    base = lorac.compile(case.model32, {}, target="onnxruntime", example_inputs=(x,))(x)
    assert torch.equal(compiled(x), base)
    idle = compiled.engine.slots
    contents = compiled._state.bound.content.tensors
    spoilt = {n: t if idle[n].role.endswith(".t") else torch.full_like(t, torch.nan) for n, t in contents.items()}
    inputs = dict(zip(compiled.engine.graphs["main"].interface.inputs, (x,), strict=True))
    (found,) = compiled.engine.outputs("main", spoilt, inputs)
    assert torch.equal(found, base)
