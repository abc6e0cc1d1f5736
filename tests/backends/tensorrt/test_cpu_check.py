"""The self-test of emitted files on the CPU finds lost slots, in half precision too."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.backends.onnx.passes import OnnxPass
from lorac.backends.tensorrt import dialect
from lorac.backends.tensorrt.cpu_check import widen_graph
from lorac.backends.tensorrt.dialect import DIALECT
from lorac.ir.graph.interpreter import read_example_inputs, run_graph
from lorac.ir.graph.passes import PassResult
from lorac.testing import assert_close
from tests.backends.tensorrt.building import compile_recorded, quietly
from tests.refusing import refuses

X = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
HALF = ["float32", "float16", "bfloat16"]


class Twins(nn.Module):
    """Two layers of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(10, 14), nn.Linear(10, 14)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.one(x)) + self.two(torch.sin(x))


def host() -> nn.Module:
    torch.manual_seed(0)
    return Twins().eval()


class Exchange(OnnxPass):
    """Exchanges the slots that the products of two layers read."""

    name = "exchange"

    def apply(self, model: ir.Model) -> PassResult:
        one, two = (next(value for value in model.graph.inputs if value.name == name) for name in ("one:b", "two:b"))
        first, second = list(one.uses()), list(two.uses())
        for (node, place), other in [*((use, two) for use in first), *((use, one) for use in second)]:
            node.replace_input_with(place, other)
        return PassResult(changed=True)


class Bypass(OnnxPass):
    """Takes the pair out of the first layer's output."""

    name = "bypass"

    def apply(self, model: ir.Model) -> PassResult:
        slot = next(value for value in model.graph.inputs if value.name == "one:b")
        (product,) = slot.consumers()
        zero = ir.Node("", "Sub", [product.outputs[0], product.outputs[0]])
        model.graph.insert_after(product, zero)
        product.outputs[0].replace_all_uses_with(zero.outputs[0])
        zero.replace_input_with(0, product.outputs[0])
        zero.replace_input_with(1, product.outputs[0])
        return PassResult(changed=True)


@pytest.mark.medium("exchanged slots", cases=["Bypass*"])
@pytest.mark.slow("float32; the check is the same", cases=["*float16"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("harm", "said"), [(Exchange, "are exchanged|give other answers"), (Bypass, "change nothing")])
def test_rejects_a_file_that_lost_a_part(monkeypatch, harm, said, dtype):
    monkeypatch.setattr(dialect, "DIALECT", replace(DIALECT, late_rewrites=(harm(),)))
    adapters = {"a": lorac.LoRA(r=2, targets=["one", "two"])}
    with refuses("self_test_failed", match=said):
        quietly(model=host(), adapters=adapters, example_inputs=(X,), dtype=dtype)
    quietly(model=host(), adapters=adapters, example_inputs=(X,), dtype=dtype, self_test=False)


@pytest.mark.medium("test_leaves_a_float32_program_unchanged")
def test_compares_half_precision_programs_in_float32():
    """The program of a half host, computed whole, is off from itself in half precision by that rounding alone."""
    found = compile_recorded(
        model=host(), adapters={"a": lorac.LoRA(r=2, targets=["one"])}, example_inputs=(X,), dtype="float16"
    )
    graph = found.program.graphs["main"]
    inputs, slots = read_example_inputs(graph, graph.interface.inputs), found.compiled.switch.state.bound.tensors
    (half,), whole = run_graph(graph, inputs, slots), widen_graph(graph)
    assert whole is not graph
    weights = {name: weight.float() for name, weight in graph.exported.state_dict.items()}
    (full,) = run_graph(whole, inputs, slots, weights)
    (emitted,) = found.tried.outputs("main", slots, inputs)
    assert half.dtype == full.dtype == emitted.dtype == torch.float16
    assert_close(emitted, full)
    assert_close(half, full)
    assert any(node.meta["val"].dtype == torch.float16 for node in graph.fx.nodes if node.op == "call_function")
    inner = [node.kwargs.get("dtype") for node in whole.fx.nodes if node.op == "call_function"]
    assert inner.count(torch.float16) == 1 and inner[-1] == torch.float16  # what is answered, and nothing before


def test_leaves_a_float32_program_unchanged():
    found = compile_recorded(model=host(), adapters={"a": lorac.LoRA(r=2, targets=["one"])}, example_inputs=(X,))
    graph = found.program.graphs["main"]
    assert widen_graph(graph) is graph
