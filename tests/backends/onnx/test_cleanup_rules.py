"""Ops without an effect are removed from a program; ops with a small effect stay."""

import onnx_ir as ir
import pytest
from onnxscript import rewriter

from lorac.backends.onnx.cleanup_rules import default_rules, exact_no_op_rules

GRAPH = """<ir_version: 10, opset_import: ["": 20]> g (float[2] x) => (float[2] y) {{
    c = Constant <value = float {{ {value} }}> ()
    y = {op} ({operands})
}}"""


@pytest.mark.parametrize(
    ("op", "operands", "neutral", "little"),
    [
        ("Add", "x, c", "0.0", "1e-9"),
        ("Add", "c, x", "0.0", "1e-15"),
        ("Sub", "x, c", "0.0", "1e-9"),
        ("Mul", "c, x", "1.0", "1.000005"),
        ("Div", "x, c", "1.0", "1.000005"),
    ],
)
def test_removes_only_ops_that_change_no_value(op, operands, neutral, little):
    for value, left in ((neutral, "Identity"), (little, op)):
        model = ir.from_onnx_text(GRAPH.format(value=value, op=op, operands=operands))
        rewriter.RewritePass([*default_rules(), *exact_no_op_rules()])(model)
        assert model.graph.outputs[0].producer().op_type == left


def test_rules_that_others_used_are_copied_without_the_graph_that_they_saw():
    model = ir.from_onnx_text(GRAPH.format(value="0.5", op="Add", operands="x, c"))
    rewriter.RewritePass(rewriter._DEFAULT_REWRITE_RULES)(model)
    seen = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if _find_graphs(rule)]
    assert seen and not any(map(_find_graphs, [*default_rules(), *exact_no_op_rules()]))


def _find_graphs(rule):
    return [value for value in vars(rule._matcher).values() if isinstance(value, ir.Graph)]
