"""Which ops of a program the op of lorac-native takes the place of."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from lorac.backends.onnxruntime.native_op import OP, use_native_op
from tests.native.graphs import RESIDUAL, Case, own_ops

CASE = Case(1, 2, 8, (3, 3), (6, 5))


def _ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_uses_one_op_for_all_layers_of_a_fused_projection() -> None:
    model = own_ops(CASE)
    assert use_native_op(model) == 2
    (node,) = model.graph.node
    assert node.input == ["x", "base", "0:a", "0:b", "1:a", "1:b"]
    assert node.output == ["y0", "y1"]
    assert use_native_op(model) == 0  # nothing is left


def test_a_product_that_another_op_reads_stays() -> None:
    model = own_ops(CASE)
    model.graph.output.append(model.graph.value_info[0])
    assert use_native_op(model) == 2
    assert _ops(model) == ["Split", OP, OP]


def test_a_layer_without_an_adapter_gets_its_part_of_the_product() -> None:
    model = own_ops(CASE)
    del model.graph.node[4:]
    model.graph.output[1].name = "base1"
    assert use_native_op(model) == 1
    (node,) = model.graph.node
    assert node.output == ["y0", "base1"]
    assert {a.name: list(a.ints) for a in node.attribute} == {"widths": [6, 5], "parts": [1, 0]}


def test_values_that_others_read_stay_computed() -> None:
    model = own_ops(CASE)
    model.graph.output.append(helper.make_tensor_value_info("u0", TensorProto.FLOAT, None))
    assert use_native_op(model) == 1
    assert _ops(model) == [OP, "MatMul", "MatMul", "Add"]


def test_factors_that_another_op_reads_stay_float32() -> None:
    model = own_ops(CASE)
    model.graph.node.append(helper.make_node("Neg", ["1:b"], ["other"]))
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, None))
    assert use_native_op(model, half=True) == 0
    assert {value.type.tensor_type.elem_type for value in model.graph.input} == {TensorProto.FLOAT}


def test_adds_a_residual_of_the_same_sizes_alone() -> None:
    model, wide = (own_ops(Case(1, 2, 8, (3,), (6,), RESIDUAL)) for _ in range(2))
    assert use_native_op(model) == 1
    (node,) = model.graph.node
    assert node.input == ["x", "base", "0:a", "0:b", "residual0"]
    assert {a.name: list(a.ints) for a in node.attribute} == {"widths": [6], "parts": [17]}
    broadcast = next(value for value in wide.graph.input if value.name == "residual0")
    broadcast.type.tensor_type.shape.dim[1].dim_value = 1
    assert use_native_op(wide) == 1
    assert _ops(wide) == [OP, "Add"]


def test_gives_attention_its_operands_as_one_value() -> None:
    model = own_ops(Case(1, 2, 8, (3, 3, 3), (6, 5, 5)))
    model.graph.value_info.extend(model.graph.output)
    del model.graph.output[:]
    model.graph.node.append(helper.make_node("GroupQueryAttention", ["y0", "y1", "y2", "past"], ["y"]))
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    read = onnx.ModelProto.FromString(model.SerializeToString())
    assert use_native_op(model) == 3
    op, attention = model.graph.node
    assert list(attention.input) == [*op.output, "", "", "past"]
    read.graph.output.append(helper.make_tensor_value_info("y1", TensorProto.FLOAT, None))
    assert use_native_op(read) == 3
    assert list(read.graph.node[1].input) == ["y0", "y1", "y2", "past"]
