"""The ops that TensorRT's parser takes, compared with lorac's list; foreign ops; inputs that became constants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import lorac
from lorac.backends.onnx.passes import OnnxPass
from lorac.backends.tensorrt import build, dialect
from lorac.backends.tensorrt.dialect import CLAIMS, DIALECT
from lorac.backends.tensorrt.network import check_inputs, parse_model
from lorac.backends.tensorrt.profiles import SizeRange
from lorac.ir.graph.passes import PassResult
from tests.backends.tensorrt.building import quietly
from tests.backends.tensorrt.tiny import LIBRARY
from tests.refusing import refuses

X = torch.randn(3, 4)


def _parser() -> Any:
    trt = LIBRARY.module
    builder = trt.Builder(LIBRARY.logger)
    made = builder.create_network(0)
    return trt.OnnxParser(made, LIBRARY.logger), (builder, made)


@pytest.mark.skipif(
    not LIBRARY.module.__version__.startswith("1.7."), reason="the list is that of TensorRT for RTX 1.7"
)
def test_claims_equal_the_ops_of_the_library():
    """Op by op, by name; the library says nothing of domains, so what it takes of others is not claimed."""
    parser, _kept = _parser()
    defined = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    taken = {("", op) for op in defined if parser.supports_operator(op)}
    withdrawn = {("", "Scatter")}  # by ONNX itself, which has ScatterElements
    assert taken | (withdrawn & CLAIMS) == CLAIMS
    assert parser.supports_operator("RotaryEmbedding") and ("com.microsoft", "RotaryEmbedding") not in CLAIMS


class Layers(nn.Module):
    """Two layers, each with an activation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        return torch.tanh(self.two(h))


class RenameActivations(OnnxPass):
    """Moves activations to another domain, whose op names the parser would take for ONNX's own."""

    name = "rename-activations"

    def apply(self, model: ir.Model) -> PassResult:
        for node in model.graph:
            if node.op_type == "Tanh":
                node.domain = "made.up"
        model.graph.opset_imports["made.up"] = 1
        return PassResult(changed=True)


def test_rejects_custom_ops_before_parsing(monkeypatch):
    """All of them are named, each with its module and line, though the parser would take them."""
    monkeypatch.setattr(dialect, "DIALECT", replace(DIALECT, late_rewrites=(RenameActivations(),)))
    monkeypatch.setattr(build, "parse_model", lambda *_: pytest.fail("it was parsed"))
    with pytest.raises(lorac.Unavailable, match=r"tensorrt does not compute made\.up::Tanh") as error:
        quietly(model=Layers().eval(), adapters={"a": lorac.LoRA(targets=["one"])}, example_inputs=(X,))
    first, second = error.value.what.split("; nor ")
    assert "line" in first and "line" in second and "test_network.py" in first


def test_rejects_unknown_ops_by_name(tmp_path):
    path = _written(tmp_path, [helper.make_node("Add", ["x", "x"], ["h"]), helper.make_node("Det", ["h"], ["y"])])
    with pytest.raises(lorac.Unavailable, match=rf"{LIBRARY.name_and_version} does not compute Det"):
        parse_model(path, LIBRARY)


def test_rejects_an_op_with_the_parsers_reason(tmp_path):
    """An op that it knows, as it does not take it."""
    half = helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16)
    path = _written(tmp_path, [half, helper.make_node("Add", ["x", "h"], ["y"], name="made")])
    with pytest.raises(lorac.Unavailable, match=r"tensorrt does not take Add \("):
        parse_model(path, LIBRARY)


def test_an_input_with_a_value_becomes_a_constant_and_is_found(tmp_path):
    """As ONNX's optional inputs are, which other targets have for slots."""
    path = _written(tmp_path, [helper.make_node("Add", ["x", "slot"], ["y"])], weight="slot")
    parsed = parse_model(path, LIBRARY)
    assert [parsed.network.get_input(i).name for i in range(parsed.network.num_inputs)] == ["x"]
    sizes = (SizeRange(1, 2, 8), SizeRange(4, 4, 4))
    check_inputs(parsed, {"x": torch.float32}, {"x": sizes})
    for wanted, ranges in (
        ({"x": torch.float32, "slot": torch.float32}, {"x": sizes, "slot": sizes}),
        ({"x": torch.float16}, {"x": sizes}),
        ({"x": torch.float32}, {"x": (SizeRange(1, 2, 8), SizeRange(5, 5, 5))}),
        ({"x": torch.float32}, {"x": (SizeRange(1, 2, 8),)}),
        ({}, {}),
    ):
        with refuses("self_test_failed", match=r"1 inputs of the network are not those of the program"):
            check_inputs(parsed, wanted, ranges)


def _written(folder: Path, nodes: list[onnx.NodeProto], weight: str = "") -> Path:
    """Write a model of x (rows, 4) with these nodes, one of whose inputs has a value."""
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 4]) for name in ("x", *filter(None, [weight]))
    ]
    values = [onnx.numpy_helper.from_array(np.ones((1, 4), "f4"), weight)] if weight else []
    answered = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    made = helper.make_model(
        helper.make_graph(nodes, "g", given, [answered], values), opset_imports=[helper.make_opsetid("", 18)]
    )
    onnx.save(made, folder / "model.onnx")
    return folder / "model.onnx"
