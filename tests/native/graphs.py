"""Layers that read one x, in ONNX Runtime's own ops, as programs have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

RESIDUAL = "r"


@dataclass(frozen=True)
class Case:
    """Shapes of one call: rows in segments, K, and the rank and width of each layer; layers' scales, and a residual."""

    places: int
    segment: int
    features: int
    ranks: Sequence[int]
    widths: Sequence[int]
    scales: str = ""

    def __str__(self) -> str:
        sizes = ".".join(map(str, (*self.ranks, *self.widths)))
        return f"{self.places}x{self.segment}-{self.features}-{sizes}{self.scales}"


def own_ops(case: Case) -> onnx.ModelProto:
    """Return a model of the inputs x, base, and 0:a, 0:b, 1:a and so on, and the outputs y0, y1 and so on."""
    nodes = [helper.make_node("Split", ["base", "sizes"], [f"base{i}" for i in range(len(case.widths))], axis=-1)]
    inputs = [_value("x", case.features), _value("base", sum(case.widths))]
    outputs, parts = [], []
    for i, width in enumerate(case.widths):
        inputs += [_value(f"{i}:a", f"rank{i}", case.features), _value(f"{i}:b", width, f"rank{i}")]
        nodes.append(helper.make_node("MatMul", ["x", f"{i}:a"], [f"u{i}"]))
        u, pair, part = f"u{i}", f"pair{i}", f"base{i}"
        roles = case.scales.replace(RESIDUAL, "")
        inputs += [_value(f"{i}:{role}", f"rank{i}" if role == "g" else width, 1) for role in roles]
        if "g" in case.scales:
            nodes.append(helper.make_node("Mul", [u, f"{i}:g"], [f"{u}g"]))
            u = f"{u}g"
        if "c" in case.scales:
            nodes.append(helper.make_node("Mul", [part, f"{i}:c"], [f"{part}c"]))
            part = f"{part}c"
        nodes.append(helper.make_node("MatMul", [u, f"{i}:b"], [pair]))
        if "h" in case.scales:
            nodes.append(helper.make_node("Mul", [pair, f"{i}:h"], [f"{pair}h"]))
            pair = f"{pair}h"
        y = f"y{i}" if RESIDUAL not in case.scales else f"sum{i}"
        nodes.append(helper.make_node("Add", [part, pair], [y]))
        if RESIDUAL in case.scales:
            nodes.append(helper.make_node("Add", [f"residual{i}", y], [f"y{i}"]))
            inputs.append(_value(f"residual{i}", width))
            parts.append(_value(y, width))
        outputs.append(_value(f"y{i}", width))
        parts.append(_value(f"base{i}", width))
    sizes = onnx.numpy_helper.from_array(np.array(case.widths), "sizes")
    graph = helper.make_graph(nodes, "layers", inputs, outputs, [sizes], value_info=parts)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _value(name: str, last: int | str, rows: int | str = "tokens") -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["places", rows, last])
