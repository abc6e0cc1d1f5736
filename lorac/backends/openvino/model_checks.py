"""A check of stored models, since OpenVINO ends the process for a wrong one, and the error for an op that it lacks."""

import math
import re
from collections.abc import Mapping

import onnx

from lorac.backends.onnx.claims import describe_origin, read_metadata
from lorac.backends.onnx.model_files import Array, walk_nodes
from lorac.errors import ArtifactError, Unavailable, short

_ROOM, _SLACK = 16, 1 << 26
"""Bytes of a value of known sizes: so many times those of the model's weights, and so many more."""


def check_operands(model: onnx.ModelProto, weights: Mapping[str, Array]) -> None:
    """Refuse a model in which an op cannot take its operands, or a constant names sizes that are far too large.

    Args:
        weights: name -> a weight outside of the model, whose values no check needs.

    Raises:
        ArtifactError: naming the first op that is wrong.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in [tensor for tensor in bare.graph.initializer if tensor.name in weights]:
        bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        bare.graph.initializer.remove(tensor)
    try:
        onnx.checker.check_model(bare)
        known = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _wrong_model(short(str(error).partition("\n")[0])) from error
    most = _ROOM * sum(array.nbytes for array in weights.values()) + _SLACK
    for value in known.graph.value_info:
        tensor, sizes = value.type.tensor_type, [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if math.prod(sizes) * onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize > most:
            raise _wrong_model(f"'{value.name}' has the sizes {short(sizes)}")


def _wrong_model(reason: str) -> ArtifactError:
    return ArtifactError(
        f"the model of this artifact is not one that lorac writes: {reason}",
        next_step="do not use this artifact, or give trust=True if you made it or trust its maker",
    )


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
