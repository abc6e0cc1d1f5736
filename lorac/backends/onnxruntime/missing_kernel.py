"""The error for an op without a kernel in the program's dtype, naming the module and the line that use the op.

Only a session knows for which dtypes an op has kernels; it reports a missing one when it is created.
"""

import re
from typing import Any

import onnx
from onnx import NodeProto, TypeProto

from lorac.backends.onnx.claims import describe_origin, read_metadata
from lorac.backends.onnx.model_files import walk_nodes
from lorac.errors import Unavailable

_MISSING = re.compile(r"implementation for (\w+)\(\d+\) node with name '(.*?)'")
_NAMES = {
    onnx.TensorProto.DOUBLE: "float64",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


def missing_kernel_error(model: onnx.ModelProto, error: Exception) -> Unavailable:
    """Return the error for a session that could not be created because of a missing kernel.

    Args:
        error: the session's error, which names an op and, if the model names it, a node.
    """
    found = _MISSING.search(str(error))
    op, name = found.groups() if found else ("an op", "")
    dtypes = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    dtype = next((known for kind, known in _NAMES.items() if kind in dtypes), "its dtype")
    nodes = list(walk_nodes(model.graph))
    named = [node for node in nodes if name and node.name == name] or [node for node in nodes if node.op_type == op]
    # ONNX Runtime may have expanded an op that is a function of other ops.
    node = next(iter(named or [node for node in nodes if op in _function_body_ops(node)]), None)
    origin = "" if node is None else describe_origin(read_metadata(node))
    inner = "" if node is None or node.op_type == op else f" (part of {node.op_type})"
    return Unavailable(
        f"onnxruntime has no kernel for {op}{inner} in {dtype}{origin}",
        next_step="compile with dtype='float32', or with target='eager' in the model's own dtype",
    )


def _function_body_ops(node: NodeProto) -> set[str]:
    """Return the ops in an op's function body for float64 operands; empty for an op without a function body."""
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, domain=node.domain)  # typed without its functions
    except onnx.defs.SchemaError:
        return set()
    if schema.has_function:
        return {inner.op_type for inner in schema.function_body.node}
    if not schema.has_context_dependent_function:
        return set()
    operand = TypeProto()
    operand.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    types = [operand.SerializeToString()] * len(node.input)
    body = onnx.FunctionProto()
    body.ParseFromString(schema.get_context_dependent_function(node.SerializeToString(), types))
    return {inner.op_type for inner in body.node}
