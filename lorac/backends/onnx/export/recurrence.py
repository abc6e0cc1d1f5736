"""``lorac::recurrence`` in ONNX: a ``Scan`` over the tokens, whose body is one step."""

from collections.abc import Sequence

import onnx_ir as ir

from lorac.backends.onnx.export.opsets import Outputs, op


def recurrence(
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    decay: ir.Value,
    rate: ir.Value | None,
    beta: ir.Value | None,
    state: ir.Value,
) -> Outputs:
    """Write a ``Scan``; what each token computes by itself comes before it, for all tokens at once."""
    row, column = op.Constant(value_ints=[3]), op.Constant(value_ints=[4])
    scanned = [op.Unsqueeze(q, row), op.Unsqueeze(k, column), op.Unsqueeze(v, row)]
    scanned.append(op.Exp(decay) if rate is None else decay)
    if beta is not None:
        scanned += [op.Unsqueeze(k, row), op.Unsqueeze(beta, op.Constant(value_ints=[3, 4]))]
    body = _write_step(state, rate, with_beta=beta is not None)
    axes = [1] * len(scanned)
    behind, y = op.Scan(
        state, *scanned, body=body, num_scan_inputs=len(scanned), scan_input_axes=axes, scan_output_axes=[1]
    )
    return [op.Squeeze(y, row), behind]


def _write_step(state: ir.Value, rate: ir.Value | None, *, with_beta: bool) -> ir.Graph:
    """Return the graph of one token: (state, query, key, value, decay[, key, beta]) -> state, output."""
    assert state.dtype is not None
    nodes: list[ir.Node] = []

    def write(kind: str, *operands: ir.Value) -> ir.Value:
        nodes.append(ir.node(kind, operands, outputs=[ir.val(f"token_{len(nodes)}", state.dtype)]))
        return nodes[-1].outputs[0]

    names = ["state", "query", "key", "value", "decay", *(["read_key", "beta"] if with_beta else [])]
    inputs: Sequence[ir.Value] = [ir.val(f"token_{name}", state.dtype) for name in names]
    held, q, k, v, factor, *correction = inputs
    if rate is not None:
        factor = write("Exp", write("Mul", factor, rate))
    held = write("Mul", held, factor)
    if correction:
        read, beta = correction
        v = write("Mul", write("Sub", v, write("MatMul", read, held)), beta)
    held = write("Add", held, write("Mul", k, v))
    return ir.Graph(inputs, [held, write("MatMul", q, held)], nodes=nodes, name="token")
