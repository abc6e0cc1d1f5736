"""``lorac::recurrence`` in ONNX: a ``Scan`` over tokens, or over chunks of tokens if each head has a single decay.

A chunk computes its tokens' products as matrices (arXiv:2405.21060, section 6; arXiv:2412.06464, section 3.3), and
reads and writes the state once. So a long prompt takes a fraction of the time of a scan over tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lorac.backends.onnx.export.opsets import Outputs, op, record_with
from lorac.backends.onnx.export.torchlib import Recorder

BY_CHUNKS = "many"
"""Name of the graph that computes a call of many tokens by chunks; it takes any number of them."""
_CHUNK = 16
"""Tokens of a chunk; fewer are computed one by one."""
_DOUBLINGS = 3
"""How often a product of as many factors as a chunk has tokens is doubled, beyond the first two."""


def recurrence(
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    decay: ir.Value,
    rate: ir.Value | None,
    beta: ir.Value | None,
    state: ir.Value,
) -> Outputs:
    """Write the op: token by token for few tokens or if features have separate decays, otherwise by chunks."""
    operands = [q, k, v, decay, *([] if beta is None else [beta])]
    assert decay.shape is not None
    if rate is not None or decay.shape[3:] != (1, 1):
        return _scan_tokens(state, rate, *operands)
    few = _record_graph("few", lambda: _scan_tokens(state, None, *operands))
    many = _record_graph(BY_CHUNKS, lambda: _scan_chunks(state, *operands))
    is_few = op.Less(op.Squeeze(op.Shape(q, start=1, end=2)), op.Constant(value_int=_CHUNK))
    return op.If(is_few, then_branch=few, else_branch=many)


def _scan_tokens(state: ir.Value, rate: ir.Value | None, *operands: ir.Value) -> list[ir.Value]:
    """Write a ``Scan`` over tokens; products that involve one token only are computed for all tokens before it."""
    q, k, v, decay, *beta = operands
    row, column = op.Constant(value_ints=[3]), op.Constant(value_ints=[4])
    scanned = [op.Unsqueeze(q, row), op.Unsqueeze(k, column), op.Unsqueeze(v, row)]
    scanned.append(op.Exp(decay) if rate is None else decay)
    if beta:
        scanned += [op.Unsqueeze(k, row), op.Unsqueeze(beta[0], op.Constant(value_ints=[3, 4]))]

    def step(
        held: ir.Value, q: ir.Value, k: ir.Value, v: ir.Value, factor: ir.Value, *correction: ir.Value
    ) -> list[ir.Value]:
        held = op.Mul(held, factor if rate is None else op.Exp(op.Mul(factor, rate)))
        if correction:
            read, beta = correction
            v = op.Mul(op.Sub(v, op.MatMul(read, held)), beta)
        held = op.Add(held, op.Mul(k, v))
        return [held, op.MatMul(q, held)]

    behind, y = _scan("token", step, state, scanned)
    return [op.Squeeze(y, row), behind]


def _scan_chunks(state: ir.Value, *operands: ir.Value) -> list[ir.Value]:
    """Write a ``Scan`` over chunks (batch, heads, tokens, size); padding at the end does not change the state."""
    q, k, v, decay, *beta = operands
    length = op.Shape(q, start=1, end=2)
    zero = op.Constant(value_ints=[0])
    added = op.Mod(op.Neg(length), op.Constant(value_ints=[_CHUNK]))
    pads = op.Concat(op.Constant(value_ints=[0, 0, 0, 0, 0]), added, op.Constant(value_ints=[0, 0]), axis=0)
    scanned = []
    for x in (q, k, v, op.Squeeze(decay, row := op.Constant(value_ints=[3])), *(op.Unsqueeze(b, row) for b in beta)):
        sizes = op.Concat(op.Constant(value_ints=[0, -1, _CHUNK]), op.Shape(x, start=2), axis=0)
        scanned.append(op.Transpose(op.Reshape(op.Pad(x, pads), sizes), perm=[0, 1, 3, 2, 4]))
    assert state.dtype is not None
    lower, dtype = np.tri(_CHUNK), state.dtype.numpy()

    def compute(
        held: ir.Value, q: ir.Value, k: ir.Value, v: ir.Value, decay: ir.Value, *beta: ir.Value
    ) -> list[ir.Value]:
        def constant(value: np.ndarray) -> ir.Value:
            return op.Constant(value=ir.tensor(value.astype(dtype)))

        past = op.MatMul(constant(lower), decay)  # the logarithms of decay up to each token
        whole = op.ReduceSum(decay, op.Constant(value_ints=[2]))
        seen = op.Add(op.Sub(past, op.Transpose(past, perm=[0, 1, 3, 2])), constant(np.where(lower, 0, -np.inf)))
        pairs, since, turned = op.Exp(seen), op.Exp(past), op.Transpose(k, perm=[0, 1, 3, 2])
        if beta:
            # (I - N)⁻¹ = (I + N)(I + N²)(I + N⁴)… for a strictly lower triangular N. Equal keys make the powers of N
            # large, and a step of Newton's method removes their rounding.
            one = constant(np.eye(_CHUNK))
            known = op.Mul(op.Mul(op.MatMul(k, turned), pairs), op.Mul(beta[0], constant(np.eye(_CHUNK) - lower)))
            inverse, power = op.Add(one, known), known
            for _ in range(_DOUBLINGS):
                power = op.MatMul(power, power)
                inverse = op.Add(inverse, op.MatMul(inverse, power))
            missing = op.Sub(one, op.Sub(inverse, op.MatMul(known, inverse)))
            inverse = op.Add(inverse, op.MatMul(inverse, missing))
            v = op.MatMul(inverse, op.Mul(op.Sub(v, op.MatMul(op.Mul(k, since), held)), beta[0]))
        y = op.Add(op.MatMul(op.Mul(q, since), held), op.MatMul(op.Mul(op.MatMul(q, turned), pairs), v))
        left = op.Mul(turned, op.Transpose(op.Exp(op.Sub(whole, past)), perm=[0, 1, 3, 2]))
        return [op.Add(op.Mul(held, op.Exp(whole)), op.MatMul(left, v)), y]

    behind, y = _scan("chunk", compute, state, scanned)
    tokens = op.Transpose(y, perm=[0, 1, 3, 2, 4])
    joined = op.Reshape(tokens, op.Concat(op.Constant(value_ints=[0, -1]), op.Shape(tokens, start=3), axis=0))
    # A program may have the state's output in the place of its input: a scan of one chunk would write it there before
    # the chunk's outputs are computed from the input. So the scan writes elsewhere, and a slice of all rows copies.
    copied = op.Slice(behind, zero, op.Shape(behind, end=1), zero)
    return [op.Slice(joined, zero, length, op.Constant(value_ints=[1])), copied]


def _scan(name: str, body: Callable[..., list[ir.Value]], state: ir.Value, scanned: Sequence[ir.Value]) -> Any:
    """Write a ``Scan`` along the second axis; return the state after all parts, and the output of each part."""
    # Some recorded values have no known dtype, and all have the state's.
    inputs = [ir.val(f"{name}_in_{number}", state.dtype) for number in range(1 + len(scanned))]
    count = len(scanned)
    graph = _record_graph(name, lambda: body(*inputs), inputs)
    return op.Scan(
        state, *scanned, body=graph, num_scan_inputs=count, scan_input_axes=[1] * count, scan_output_axes=[1]
    )


def _record_graph(name: str, write: Callable[[], Sequence[ir.Value]], inputs: Sequence[ir.Value] = ()) -> ir.Graph:
    """Record the ops that a function writes into a graph, whose values get names with a prefix."""
    recorder = Recorder()  # type: ignore[abstract]  # as for a whole graph
    with record_with(recorder):
        outputs = write()
    nodes = recorder.take_nodes()
    for number, value in enumerate(value for node in nodes for value in node.outputs):
        value.name = f"{name}_{number}"
    return ir.Graph(inputs, outputs, nodes=nodes, name=name)
