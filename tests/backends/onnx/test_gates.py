"""A branch that is off is not computed."""

from dataclasses import dataclass

import onnx
import pytest
import torch
from torch import nn

import lorac
from lorac import ParamSpec
from lorac.testing import HOSTS, Case
from tests.emitted import load_emitted, load_emitted_proto

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


@pytest.mark.medium("a router's", cases=["adaptertune"])
def test_each_branch_has_its_own_if(compiled):
    model = load_emitted(compiled)
    gates = [node for node in model.graph if node.op_type == "If"]
    assert len(gates) == len(compiled.plans["blocks.0" if "blocks.0" in compiled.plans else "site"].branches) == 2
    parameters = {name for name, slot in compiled.engine.slots.items() if ".t" not in slot.role}
    outside = {value.name for node in model.graph for value in node.inputs if value is not None}
    assert not parameters & outside, "a branch's parameters are read where it is off"


@pytest.mark.medium("the other method", cases=["adaptertune"])
def test_an_idle_branch_with_nans_keeps_the_bits_of_the_base(case, compiled):
    x = case.x.float()
    base = lorac.compile(case.model32, {}, target="onnxruntime", example_inputs=(x,))(x)
    assert torch.equal(compiled(x), base)
    idle = compiled.engine.slots
    contents = compiled.switch.state.bound.tensors
    spoilt = {n: t if idle[n].role.endswith(".t") else torch.full_like(t, torch.nan) for n, t in contents.items()}
    inputs = dict(zip(compiled.engine.graphs["main"].interface.inputs, (x,), strict=True))
    (found,) = compiled.engine.outputs("main", spoilt, inputs)
    assert torch.equal(found, base)


@dataclass(frozen=True, kw_only=True)
class BaseReader(lorac.BranchVariant):
    """Adds a multiple of what the first layer answers without adapters."""

    name, paper = "test-base-reader", "none"

    def reads(self, site):
        return ("base:0",)

    def params(self, site):
        return {"factor": ParamSpec((1,), lambda context: torch.full(context.shape, 0.5))}

    def branch(self, x, y, p, ctx):
        return y + p.factor * ctx.value("base:0")


def test_declares_the_switch_of_shared_values_with_its_type():
    adapters = {"own": lorac.LoRA(r=2, targets=["0"]), **{name: BaseReader(targets=["1"]) for name in ("a", "b")}}
    host = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5))
    compiled = lorac.compile(host, adapters, target="onnxruntime", example_inputs=(torch.ones(3, 4),))
    model = load_emitted_proto(compiled)
    assert [node.op_type for node in model.graph.node].count("Or") == 1
    onnx.shape_inference.infer_shapes(model, strict_mode=True)
