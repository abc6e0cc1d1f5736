"""Program values: rejected ones, and the limits of a base pass."""

from dataclasses import dataclass

import pytest
import torch

import lorac
from lorac import ParamSpec
from lorac.ir.graph import ops
from lorac.ir.graph.adapted_call import AdaptedCall
from lorac.ir.graph.graph import Skip
from lorac.ir.graph.passes import PassResult, run_pipeline
from lorac.passes.connect_values import ConnectValues
from lorac.passes.insert import InsertAdaptedCalls
from lorac.testing import assert_close
from tests.captured import captured_program, graph_of
from tests.refusing import refuses
from tests.variants.modules import Routed


@dataclass(frozen=True, kw_only=True)
class Reader(lorac.BranchVariant):
    """Adds a multiple of a value of the program."""

    of: str = ""
    name, paper = "test-reader", "none"

    def reads(self, site):
        return (self.of,)

    def params(self, site):
        return {"factor": ParamSpec((1,), lambda context: torch.full(context.shape, 0.5))}

    def branch(self, x, y, p, ctx):
        return y + p.factor * ctx.value(self.of)


class Host(torch.nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.relu = torch.nn.ReLU(inplace)

    def forward(self, x):
        return self.second(self.relu(self.first(x)))


X = torch.randn(3, 4)
TARGETS = pytest.mark.parametrize("target", ["eager", "onnxruntime"])


@pytest.mark.parametrize("name", ["frist", "base:frist", "later:first", "weight:"])
def test_rejects_an_unknown_value(name):
    with refuses("site_not_found", match="not a value of the program"):
        lorac.compile(Host(), {"r": Reader(of=name, targets=["second"])})


@TARGETS
def test_rejects_a_value_that_is_computed_later(target):
    with refuses("site_unreached", match="'second' is not computed before 'first'"):
        compiled = lorac.compile(Host(), {"r": Reader(of="second", targets=["first"])}, target, (X,))
        compiled(X)


@TARGETS
@torch.no_grad()
def test_a_value_is_adapted_and_a_base_value_is_not(target):
    host = Host().eval()
    adapters = {
        "own": lorac.LoRA(r=4, targets=["first"]),
        "now": Reader(of="first", targets=["second"]),
        "base": Reader(of="base:first", targets=["second"]),
        "late": Reader(of="base:second", targets=["first"]),
    }

    given = {name: lorac.compile(host, {name: a}).adapters[name] for name, a in adapters.items()}
    factors = given["own"].tensors["first"]
    factors["lora_A"].copy_(torch.eye(4))
    factors["lora_B"].copy_(host.first.weight / (2 * given["own"].variant.scale))
    shifted = 1.5 * host.first(X) - 0.5 * host.first.bias
    hidden = torch.relu(shifted)
    compiled = lorac.compile(host, given, target, (X,))
    expected = {
        "now": host.second(hidden) + 0.5 * shifted,
        "base": host.second(hidden) + 0.5 * host.first(X),
        "late": host.second(torch.relu(shifted + 0.5 * host.second(torch.relu(host.first(X))))),
    }
    for name, y in expected.items():
        assert_close(compiled(X, adapters={"own": 1, name: 1}), y)


def test_a_second_run_skips_the_sites_that_have_their_values():
    compiled = lorac.compile(Host(), {"r": Reader(of="first", targets=["second"])})
    graph = graph_of("host", captured_program(Host(), (X,)), compiled.sites, compiled.plans)
    _, (_, outcome) = run_pipeline(graph, [InsertAdaptedCalls(), ConnectValues()])
    assert outcome == PassResult(changed=True)
    (reader,) = graph.find(ops.adapted)
    (first,) = graph.find(ops.LINEAR)
    assert AdaptedCall.of(reader).operands["value:first"] is first
    assert run_pipeline(graph, [ConnectValues()]) == [
        ("values", PassResult(changed=False, skipped=(Skip("second", "it has its values already"),)))
    ]


def test_computes_a_shared_value_once():
    compiled = lorac.compile(Host(), {"r": Routed(targets=["first", "second"], of="second", width=4, n=2)})
    graph = graph_of("host", captured_program(Host(), (X,)), compiled.sites, compiled.plans)
    _, (_, outcome) = run_pipeline(graph, [InsertAdaptedCalls(), ConnectValues()])
    assert outcome == PassResult(changed=True)
    first, second = (AdaptedCall.of(reader) for reader in graph.find(ops.adapted))
    (name,) = (name for name in first.operands if name.startswith("value:") and name.endswith("gates"))
    assert first.operands[name] is second.operands[name]
    assert first.operands[name].target is torch.ops.aten.softmax.int


def test_rejects_a_base_pass_that_writes_in_place():
    host = Host(inplace=True).eval()
    with pytest.raises(lorac.CompileError, match="in place"):
        lorac.compile(host, {"r": Reader(of="base:second", targets=["first"])}, "onnxruntime", (X,))
