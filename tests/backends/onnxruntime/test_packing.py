"""Packed tokens: ops computed without padding, and unchanged outputs of every token."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from lorac.backends.onnx.passes import verify_model
from lorac.backends.onnxruntime.packing import PackTokens
from lorac.testing import assert_close

Array = np.ndarray
ROWS, LENGTH = 4, 3
DRAWN = np.random.default_rng(0)
CONSTANTS: Mapping[str, Array] = {
    "table": DRAWN.standard_normal((9, 4)).astype(np.float32),
    "angles": DRAWN.standard_normal((LENGTH, 6)).astype(np.float32),
    "w": DRAWN.standard_normal((4, 6)).astype(np.float32),
    "v": DRAWN.standard_normal((6, 5)).astype(np.float32),
    "scale": DRAWN.standard_normal(6).astype(np.float32),
    **{name: np.array(value, np.int64) for name, value in {"one": 1, "axis1": [1], "last": [-1], "two": [2]}.items()},
    **{name: np.array(value, np.int64) for name, value in {"heads": [0, 0, 2, 3], "whole": [0, 0, 6]}.items()},
    **{name: np.array(value, np.int64) for name, value in {"flat": [-1, 6], "copies": [1, 2, 1]}.items()},
}
HEAD = """<ir_version: 9, opset_import: ["" : 20]>
agraph (int64[b, s] input_ids, int32[b] new_lengths, int64[b, k] chosen, float[d, 6, r] a, float[d, r, 5] c,
        bool on) => (%s) <int64[b, s] spread> { x = Gather(table, input_ids) y = MatMul(x, w) """
SHAPES = {"rows": ["b*s", 6], "twice": ["2*b*s", 6], "pair": ["b*s", 2, 5]}
"""Shapes that the exporter knows, and ONNX does not find out."""
PACKED = {
    "an MLP": ("g = Sigmoid(y) h = Mul(y, g) o = MatMul(h, v)", "float[b, s, 5] o"),
    "a norm": ("n = LayerNormalization <axis = -1> (y, scale) o = MatMul(n, v)", "float[b, s, 5] o"),
    "heads": (
        "h = Reshape(y, heads) t = Transpose <perm = [0, 2, 1, 3]> (h) e = Exp(t) m = ReduceSum(e, last) "
        "d = Div(e, m) u = Transpose <perm = [0, 2, 1, 3]> (d) f = Reshape(u, whole) o = MatMul(f, v)",
        "float[b, s, 5] o",
    ),
    "positions": (
        "z = Shape <start = 1, end = 2> (input_ids) q = Squeeze(z) zero = Constant <value_int = 0> () "
        "p = Range(zero, q, one) i = Shape(input_ids) spread = Expand(p, i) f = Gather(angles, spread) "
        "n = Add(y, f) o = MatMul(n, v)",
        "float[b, s, 5] o",
    ),
    "experts": (
        "rows = Reshape(y, flat) u = Unsqueeze(rows, axis1) e = Expand(u, copies) twice = Reshape(e, flat) "
        "n = Neg(twice) m = MatMul(n, v) q = Shape <end = 2> (x) "
        "t = Constant <value_ints = [-1, 2, 5]> () pair = Reshape(m, t) j = ReduceMax <keepdims = 0> (pair, axis1) "
        "five = Constant <value_ints = [5]> () l = Concat <axis = 0> (q, five) o = Reshape(j, l)",
        "float[b, s, 5] o",
    ),
    "chosen tokens": (
        "h = MatMul(y, v) i = Unsqueeze(chosen, last) o = GatherND <batch_dims = 1> (h, i)",
        "float[b, k, 5] o",
    ),
    "slots with places": (
        "n = Neg(y) z = Shape <start = 0, end = 1> (a) l = Concat <axis = 0> (z, flat) u = Reshape(n, l) "
        "e = MatMul(u, a) f = MatMul(e, c) q = Shape <end = 2> (n) five = Constant <value_ints = [5]> () "
        "t = Concat <axis = 0> (q, five) j = Reshape(f, t) h = MatMul(n, v) o = Add(h, j)",
        "float[b, s, 5] o",
    ),
}
"""Ops behind the first product, and the output: all products with constants are of packed tokens."""
MIXING = {
    "a sum of the tokens before": ("m = CumSum(y, one) n = Add(m, y) o = MatMul(n, v)", "float[b, s, 5] o"),
    "a branch": (
        "n = Neg(y) h = If (on) <then_branch = t () => (float[b, s, 6] i) { i = Exp(n) }, "
        "else_branch = e () => (float[b, s, 6] j) { j = Identity(n) }> o = MatMul(h, v)",
        "float[b, s, 5] o",
    ),
    "rows put into columns": (
        "t = Transpose <perm = [0, 2, 1]> (y) n = CumSum(t, two) u = Transpose <perm = [0, 2, 1]> (n) "
        "g = Add(u, y) o = MatMul(g, v)",
        "float[b, s, 5] o",
    ),
}
"""Ops that read padded tokens, between products of packed ones."""
COUNTS = ([3, 1, 0, 2], [1, 1, 1, 1], [0, 0, 0, 1], [3, 3, 3, 3])


def emitted(case: tuple[str, str]) -> ir.Model:
    body, output = case
    model = ir.from_onnx_text(HEAD % output + body + "}")
    for name, value in CONSTANTS.items():
        constant = ir.val(name, const_value=ir.tensor(value, name=name))
        for node in model.graph.all_nodes():
            for index, used in enumerate(node.inputs):
                if used is not None and used.name == name:
                    node.replace_input_with(index, constant)
        if constant.uses():
            model.graph.register_initializer(constant)
    for value in (value for node in model.graph for value in node.outputs if value.name in SHAPES):
        value.shape, value.dtype = ir.Shape(SHAPES[str(value.name)]), ir.DataType.FLOAT
    return model


def start(model: ir.Model) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"])


def answers(session: ort.InferenceSession, counts: list[int], places: int) -> torch.Tensor:
    """The answers of the tokens that are no padding."""
    drawn = np.random.default_rng(1)
    feeds = {
        "input_ids": drawn.integers(0, 9, (ROWS, max(counts))),
        "new_lengths": np.array(counts, np.int32),
        "chosen": np.array([[max(count - 1, 0), 0] for count in counts]),
        "a": drawn.standard_normal((places, 6, 2)).astype(np.float32),
        "c": drawn.standard_normal((places, 2, 5)).astype(np.float32),
        "on": np.array(places > 1),
    }
    (found,) = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    kept = [(row, place) for row, count in enumerate(counts) for place in range(min(count, found.shape[1]))]
    return torch.from_numpy(np.stack([found[row, place] for row, place in kept]))


def shapes_of_products(model: ir.Model) -> set[str]:
    """The leading sizes of the products with constants."""
    products = [node for node in model.graph if node.op_type == "MatMul" and not node.inputs[1].is_graph_input()]
    return {str([str(size) for size in node.outputs[0].shape[:-1]]) for node in products}


@pytest.mark.parametrize("case", [*PACKED, *MIXING])
def test_each_token_gets_its_answer(case: str) -> None:
    graph = {**PACKED, **MIXING}[case]
    model = emitted(graph)
    result = PackTokens().apply(model)
    verify_model(model, after=PackTokens.name)
    assert result.changed
    assert not result.skipped
    padded, packed = start(emitted(graph)), start(model)
    for counts, places in itertools.product(COUNTS, (1, 2, ROWS)):
        assert_close(answers(packed, counts, places), answers(padded, counts, places))
    assert shapes_of_products(model) <= {str(["1", "tokens"]), str(["2*tokens"])}
    assert not PackTokens().apply(model).changed


def test_leaves_a_model_with_a_fixed_number_of_rows() -> None:
    model = emitted(PACKED["an MLP"])
    model.graph.inputs[0].shape = ir.Shape([ROWS, "s"])
    result = PackTokens().apply(model)
    assert not result.changed
    assert [skip.why for skip in result.skipped] == [
        "the model fixes the number of rows or of tokens, so all rows have as many"
    ]


def test_reports_a_product_that_may_mix_tokens() -> None:
    model = emitted(("t = Transpose <perm = [1, 0, 2]> (y) o = MatMul(t, v)", "float[s, b, 5] o"))
    (skip,) = PackTokens().apply(model).skipped
    assert "not known to be token by token" in skip.why
