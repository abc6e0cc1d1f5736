"""The error for an op that OpenVINO does not compute, naming the module and the line that use the op."""

import re

import onnx

from lorac.backends.onnx.claims import describe_origin, read_metadata
from lorac.backends.onnx.model_files import walk_nodes
from lorac.errors import Unavailable, short

_FAILURES = re.compile(
    r"ONNX node '<Node\((?P<op>\w+)\): (?P<name>.*?)>'(?P<why>.*?)\n\n"
    r"|operation of type: (?P<op2>\w+) name: (?P<name2>\S+)(?P<why2>.*?)\n\n"
    r"|rule found for operations: (?P<op3>\w+)-",
    re.DOTALL,
)
"""The sentences in which OpenVINO names an op that it does not compute, with its node or the node's result, and why in
the last line."""


def missing_op_error(model: onnx.ModelProto, text: str) -> Unavailable:
    """Return the error for a model that OpenVINO cannot read, from the text of OpenVINO's error.

    That text names every op that OpenVINO could not translate, including ops that read another such op's result. The
    order of nodes in the model shows which came first.
    """
    nodes, found = list(walk_nodes(model.graph)), list[tuple[int, str, str]]()
    for match in _FAILURES.finditer(text):
        op, name, why = ([*filter(None, match.group(key, f"{key}2"))] for key in ("op", "name", "why"))
        kind = op[0] if op else match["op3"]
        known = [index for index, node in enumerate(nodes) if name and name[0] in (node.name, *node.output)]
        known += [index for index, node in enumerate(nodes) if node.op_type == kind]
        found.append((known[0] if known else len(nodes), kind, why[0].strip().splitlines()[-1] if why else ""))
    if not found:
        lines = [line for line in text.splitlines() if line and not line.startswith(("Exception from", "Check '"))]
        what = f"openvino does not take this program: {short(lines[0] if lines else text)}"
    else:
        index, kind, reason = min(found)
        node = nodes[index] if index < len(nodes) else onnx.NodeProto(op_type=kind)
        origin = describe_origin(read_metadata(node))
        what = f"openvino does not compute {node.op_type}{f' ({reason})' if reason else ''}{origin}"
    return Unavailable(what, next_step="target='onnxruntime' and target='eager' run it")
