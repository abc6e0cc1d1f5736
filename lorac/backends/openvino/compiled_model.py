"""Compiled models over the open files of a program."""

from collections.abc import Collection

import onnx
import openvino as ov
import torch
from openvino.preprocess import PrePostProcessor

from lorac.backends.onnx.model_files import Array, read_model_files
from lorac.backends.onnx.quantised.codec import INT8_LEVEL
from lorac.backends.openvino.model_checks import check_operands, missing_op_error
from lorac.backends.openvino.options import CPU, PRECISIONS, OpenVINOOptions, get_core
from lorac.ir.graph.attention_ops import is_key_or_value
from lorac.target.engine import ProgramFiles

OV_TYPES = {
    torch.float32: ov.Type.f32,
    torch.float64: ov.Type.f64,
    torch.float16: ov.Type.f16,
    torch.bfloat16: ov.Type.bf16,
    torch.int64: ov.Type.i64,
    torch.int32: ov.Type.i32,
    torch.int16: ov.Type.i16,
    torch.int8: ov.Type.i8,
    torch.uint8: ov.Type.u8,
    torch.bool: ov.Type.boolean,
}
"""torch's dtype -> OpenVINO's."""
IN_MEMORY = "*/_ORT_MEM_ADDR_/*"
"""The file in which OpenVINO looks for a tensor at an address of this process, which it copies. It refuses paths of
open files, and messages of more than 2 GiB, so there is no other way to a checked weight."""

_ROUNDED_TOGETHER = 32
"""The values of an operand that share a scale; OpenVINO rounds nothing where they are more than a block of weights."""
_FUSIONS, _UNFUSED = "src/common/snippets/", {"SNIPPETS_MODE": "DISABLE"}
"""Where OpenVINO 2026.4 fails to fuse ops that share a constant, as attention with a mask does, and the setting with
which it does not try; it is in no documentation."""


def compile_model(
    files: ProgramFiles, graph: str, slots: Collection[str], options: OpenVINOOptions, *, sound: bool
) -> tuple[ov.CompiledModel, dict[str, str]]:
    """Compile a graph's model for a device; OpenVINO copies the weights from the open file.

    Args:
        files: the open files of the program.
        slots: the names of slot inputs; they get the compute precision, as keys and values of a cache do.
        sound: whether lorac has just written the files, or the caller trusts who did.

    Returns:
        The compiled model, and the metadata of its file.

    Raises:
        ArtifactError: a weight is not at the offset that the model gives, or an op does not take its operands.
        Unavailable: OpenVINO does not compute an op of the model.
    """
    proto, weights = read_model_files(files, graph)
    if not sound:
        check_operands(proto, weights)
    _read_shapes(proto, weights)
    for tensor in (tensor for tensor in proto.graph.initializer if tensor.name in weights):
        array = weights[tensor.name]
        tensor.ClearField("external_data")
        for key, value in {"location": IN_MEMORY, "offset": array.ctypes.data, "length": array.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
    core = get_core()
    device = options.device_name
    # Always set the precision and the quantisation of operands: OpenVINO's defaults round both if the CPU can.
    together = min(_ROUNDED_TOGETHER, options.block_size) if options.product_level == INT8_LEVEL else 0
    settings: dict[str, object] = {
        "INFERENCE_PRECISION_HINT": options.precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": together,
        "NUM_STREAMS": options.streams,
    }
    if device == CPU:
        settings["INFERENCE_NUM_THREADS"] = options.threads
    try:
        model = core.read_model(proto.SerializeToString())
        dtype = OV_TYPES[PRECISIONS[options.precision]]
        steps = PrePostProcessor(model)
        for port in model.inputs:
            name = port.node.friendly_name
            if port.element_type == ov.Type.f32 and (name in slots or is_key_or_value(name)):
                steps.input(port.any_name).tensor().set_element_type(dtype)
        for index, output in enumerate(proto.graph.output):
            if is_key_or_value(output.name):
                steps.output(index).tensor().set_element_type(dtype)
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
        model = steps.build()
        try:
            return core.compile_model(model, device, settings), metadata
        except RuntimeError as error:
            if _FUSIONS not in str(error):
                raise
            return core.compile_model(model, device, {**settings, **_UNFUSED}), metadata
    except RuntimeError as error:
        raise missing_op_error(proto, str(error)) from error


def _read_shapes(proto: onnx.ModelProto, weights: dict[str, Array]) -> None:
    """Make constants of weights that ops read in another shape, as for a table that an output layer shares."""
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in [node for node in proto.graph.node if node.op_type == "Reshape" and node.input[0] in weights]:
        name, shape = node.output[0], stored.get(node.input[1])
        if shape is not None and shape.name not in weights:
            weights[name] = weights[node.input[0]].reshape(onnx.numpy_helper.to_array(shape))
            kind, place = stored[node.input[0]].data_type, onnx.TensorProto.EXTERNAL
            proto.graph.initializer.add(name=name, data_type=kind, data_location=place, dims=weights[name].shape)
            proto.graph.node.remove(node)
