"""Rules are tried only where they may match, and give the result of onnxscript's own pass."""

import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import pattern

from lorac.backends.onnx.passes import make_rewrite_pass

TEXT = """
<ir_version: 10, opset_import: ["" : 22]>
agraph (float[2, 3] x) => (float[2, 3] y) {
    a = Neg (x)
    b = Neg (a)
    c = Abs (b)
    d = Identity (c)
    y = Abs (d)
}
"""


def rules(tried):
    """Two negations are none, two absolute values one."""

    def noted(op, x, **_):
        tried.append(x.name)
        return True

    return [
        pattern.RewriteRule(lambda op, x: op.Neg(op.Neg(x)), lambda op, x: op.Identity(x), noted),
        pattern.RewriteRule(lambda op, x: op.Abs(op.Identity(x)), lambda op, x: op.Abs(x), noted),
    ]


def test_the_program_is_the_same():
    one, other = ir.from_onnx_text(TEXT), ir.from_onnx_text(TEXT)
    first, second = [], []
    rewriter.RewritePass(rules(first))(one)
    make_rewrite_pass(rules(second))(other)
    assert first == second and set(first) == {"x", "c"}
    assert [node.op_type for node in one.graph] == [node.op_type for node in other.graph]


def test_a_rule_is_set_up_where_its_op_is(monkeypatch):
    model, tried = ir.from_onnx_text(TEXT), []
    negations, _ = rules([])
    monkeypatch.setattr(negations, "match", lambda model, graph, node, **_: tried.append(node.op_type))
    make_rewrite_pass([negations])(model)
    assert tried == ["Neg", "Neg"]
