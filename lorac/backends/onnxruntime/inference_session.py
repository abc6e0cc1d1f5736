"""Sessions over the open files of a program, always made with the same settings."""

from __future__ import annotations

import functools
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from lorac.backends.onnx.model_files import WEIGHTS_FILE, Array, graph_file, read_model_files, walk_subgraphs
from lorac.backends.onnxruntime.devices.providers import start_session
from lorac.backends.onnxruntime.native_op import use_native_op
from lorac.backends.onnxruntime.options import FLOAT16, FLOAT32_LEVEL, OnnxRuntimeOptions
from lorac.backends.onnxruntime.quantised.codec import ACCURACY_ATTRIBUTE
from lorac.target.engine import ProgramFiles

TORCH_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
"""ONNX Runtime's name of a type -> torch's dtype."""
_ALLOW_SPINNING = "session.intra_op.allow_spinning"
SPIN_SETTINGS: Mapping[bool | None, Mapping[str, str]] = {
    False: {_ALLOW_SPINNING: "0"},
    None: {_ALLOW_SPINNING: "1", "session.intra_op.spin_duration_us": "20", "session.force_spinning_stop": "1"},
    True: {_ALLOW_SPINNING: "1"},
}
"""How threads wait for work: the option ``spinning`` -> ONNX Runtime's settings.

A decoding step has hundreds of operators of some ten microseconds each, and waking a thread takes as long. So spinning
saves a quarter of the step; 20 microseconds of it save nearly all of that.
"""


def session_options(options: OnnxRuntimeOptions) -> ort.SessionOptions:
    """Return ONNX Runtime's settings for the target's options."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    for name, value in SPIN_SETTINGS[options.spinning].items():
        settings.add_session_config_entry(name, value)
    settings.log_severity_level = 3
    return settings


def create_session(
    files: ProgramFiles,
    graph: str,
    options: OnnxRuntimeOptions,
    constants: Mapping[str, Array] | None = None,
    *,
    rounds: bool = True,
) -> ort.InferenceSession:
    """Create a session over a graph's model.

    ONNX Runtime gets the model's bytes, and maps the weights by the path of the open file, whatever another process
    puts in the file's place. It refuses that path once the file is deleted. Then the weights are handed over as they
    are mapped here, and ONNX Runtime copies those that it does not prepack.

    Args:
        files: the program's, open.
        constants: slot input -> its content in this session for good; kept alive by the session, and not copied.
        rounds: whether products with quantised weights may round what they read, as the model says; if not, they
            compute in float32.

    Raises:
        ArtifactError: a weight is not where the model says.
        Unavailable: an op has no kernel in the model's dtype.
    """
    weights = files.get(graph_file(graph, WEIGHTS_FILE))
    start = functools.partial(_start_session, files, graph, options, constants or {}, rounds)
    if weights is None or not weights.is_linked:
        return start(None)
    try:
        return start(weights.path)
    except Fail:
        if weights.is_linked:
            raise
        return start(None)  # the file was deleted meanwhile


def create_settled_session(
    files: ProgramFiles, graph: str, tensors: Mapping[str, torch.Tensor], options: OnnxRuntimeOptions
) -> ort.InferenceSession:
    """Create a session in which slots are constants; it holds copies, so later writes do not reach it."""
    copies = {name: tensor.detach().to("cpu", copy=True).numpy() for name, tensor in tensors.items()}
    return create_session(files, graph, options, copies)


def _start_session(
    files: ProgramFiles,
    graph: str,
    options: OnnxRuntimeOptions,
    constants: Mapping[str, Array],
    rounds: bool,
    path: Path | None,
) -> ort.InferenceSession:
    """Start a session that maps its weights from a path; without a path they are handed over."""
    model, weights = read_model_files(files, graph)
    if not rounds:
        _compute_in_float32(model.graph)
    settings = session_options(options)
    library = options.native_library
    native_layers = use_native_op(model, half=options.native == FLOAT16) if library is not None else 0
    if library is not None and native_layers:
        settings.register_custom_ops_library(library.path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    handed = _make_constants(model, stored, constants)
    weights = {name: array for name, array in weights.items() if name not in handed}
    if path is None:
        handed |= weights
    else:
        for name in weights:
            _set_location(stored[name], path.relative_to(path.anchor).as_posix())
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", path.anchor)
    values = [_alias_array(array, stored[name]) for name, array in handed.items()]
    settings.add_external_initializers(list(handed), values)
    try:
        session = start_session(model.SerializeToString(), settings, options.chosen, options.place)
    except NoKernel as error:
        from lorac.backends.onnxruntime.missing_kernel import missing_kernel_error

        raise missing_kernel_error(model, error) from error
    session.lorac_constants = handed  # the session reads the arrays for as long as it lives
    session.lorac_native_layers = native_layers
    _release_pages(weights)
    return session


def _compute_in_float32(graph: onnx.GraphProto) -> None:
    """Compute products with quantised weights in float32, without rounding inputs."""
    nodes = (node for part in (graph, *walk_subgraphs(graph)) for node in part.node)
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        if attribute.name == ACCURACY_ATTRIBUTE:
            attribute.i = FLOAT32_LEVEL


def _set_location(tensor: onnx.TensorProto, location: str) -> None:
    """Say that a weight lies in another file, at the same offset."""
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location


def _make_constants(
    model: onnx.ModelProto, stored: dict[str, onnx.TensorProto], constants: Mapping[str, Array]
) -> dict[str, Array]:
    """Make slot inputs constants whose values are handed over; return those that the model has."""
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    fixed = {name: array for name, array in constants.items() if name in types}
    for name, array in fixed.items():
        tensor = stored[name] = stored.get(name) or model.graph.initializer.add()
        data_type = types[name]
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.data_location = name, data_type, onnx.TensorProto.EXTERNAL
        tensor.dims.extend(array.shape)
        for key, value in {"location": "handed over", "offset": "0", "length": str(array.nbytes)}.items():
            tensor.external_data.add(key=key, value=value)
    for index in reversed(range(len(model.graph.input))):
        if model.graph.input[index].name in fixed:
            del model.graph.input[index]
    return fixed


def _alias_array(array: Array, tensor: onnx.TensorProto) -> ort.OrtValue:
    """Return an OrtValue over an array's own memory."""
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type)
    assert not array.size or value.data_ptr() == array.ctypes.data
    return value


def _release_pages(weights: Mapping[str, Array]) -> None:
    """Give back the memory of mapped weights after they were prepacked; pages that are read again are mapped again."""
    data: object = next(iter(weights.values()), None)
    while data is not None and not isinstance(data, mmap.mmap):
        data = data.obj if isinstance(data, memoryview) else getattr(data, "base", None)
    if data is not None and sys.platform == "linux":
        data.madvise(mmap.MADV_DONTNEED)
