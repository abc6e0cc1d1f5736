"""A check of stored models before OpenVINO reads them: it believes a model, and ends the process for a wrong one."""

import math
from collections.abc import Mapping

import onnx

from lorac.backends.onnx.model_files import Array
from lorac.errors import ArtifactError, short

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
        next_step="do not use this artifact; if you made it, or trust who did: trust=True",
    )
