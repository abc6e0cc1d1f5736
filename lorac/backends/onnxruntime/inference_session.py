"""Sessions, always made with the same settings, over files that are held."""

from __future__ import annotations

import functools
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from lorac.backends.onnx.model_files import WEIGHTS_FILE, Array, graph_file, read_model_files, walk_subgraphs
from lorac.backends.onnxruntime.devices.providers import start_session
from lorac.backends.onnxruntime.options import FLOAT32_LEVEL, OnnxRuntimeOptions
from lorac.backends.onnxruntime.quantised.codec import ACCURACY_ATTRIBUTE
from lorac.target.engine import ProgramFiles

_ALLOW_SPINNING = "session.intra_op.allow_spinning"
SPIN_SETTINGS: Mapping[bool | None, Mapping[str, str]] = {
    False: {_ALLOW_SPINNING: "0"},
    None: {_ALLOW_SPINNING: "1", "session.intra_op.spin_duration_us": "20", "session.force_spinning_stop": "1"},
    True: {_ALLOW_SPINNING: "1"},
}
"""How threads wait for work: ``spinning`` -> ONNX Runtime's settings.

A decoding step has hundreds of operators of some ten microseconds each, and waking a thread takes as long. So waiting
busily is worth a quarter of the step; 20 microseconds are enough for nearly all of that.
"""


def session_options(options: OnnxRuntimeOptions) -> ort.SessionOptions:
    """ONNX Runtime's settings for the target's options."""
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
    """A session over a graph's model.

    It gets the model's bytes, and maps the weights itself by the path of the open file, whatever lies at the file's
    place by now. That path is refused once the file has no name: then the weights are handed over as they are mapped
    here, and ONNX Runtime copies those that it does not prepack.

    Args:
        files: the program, held.
        graph: which of its graphs.
        options: the target's.
        constants: slot input -> what it holds in this session, for good; kept with the session, and not copied.
        rounds: products with quantised weights may round what they read, as the model says; False has them computed
            in float32.

    Raises:
        ArtifactError: a weight is not where the model says it is.
        Unavailable: an op has no kernel in the model's dtype.
    """
    beside = files.get(graph_file(graph, WEIGHTS_FILE))
    made = functools.partial(_start_session, files, graph, options, constants or {}, rounds)
    if beside is None or not beside.is_linked:
        return made(None)
    try:
        return made(beside.path)
    except Fail:
        if beside.is_linked:
            raise
        return made(None)  # it lost its name meanwhile


def _start_session(
    files: ProgramFiles,
    graph: str,
    options: OnnxRuntimeOptions,
    constants: Mapping[str, Array],
    rounds: bool,
    path: Path | None,
) -> ort.InferenceSession:
    """A session that maps its weights from a path, or where there is none gets them handed over."""
    model, weights = read_model_files(files, graph)
    if not rounds:
        _compute_in_float(model.graph)
    settings = session_options(options)
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
    session.lorac_constants = handed
    _release_pages(weights)
    return session


def _compute_in_float(graph: onnx.GraphProto) -> None:
    """Have products with quantised weights round nothing that they read."""
    nodes = (node for part in (graph, *walk_subgraphs(graph)) for node in part.node)
    for attribute in (
        attribute for node in nodes for attribute in node.attribute if attribute.name == ACCURACY_ATTRIBUTE
    ):
        attribute.i = FLOAT32_LEVEL


def _set_location(tensor: onnx.TensorProto, location: str) -> None:
    """Have a weight lie in another file, at the same place."""
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = location


def _make_constants(
    model: onnx.ModelProto, stored: Mapping[str, onnx.TensorProto], constants: Mapping[str, Array]
) -> dict[str, Array]:
    """Make slots constants whose values are handed over with the session; those that the model has."""
    fixed = {name: array for name, array in constants.items() if name in stored}
    for name, array in fixed.items():
        tensor = stored[name]
        kind = tensor.data_type
        tensor.Clear()
        tensor.name, tensor.data_type, tensor.data_location = name, kind, onnx.TensorProto.EXTERNAL
        tensor.dims.extend(array.shape)
        for key, told in {"location": "handed over", "offset": "0", "length": str(array.nbytes)}.items():
            tensor.external_data.add(key=key, value=told)
    for index in reversed(range(len(model.graph.input))):
        if model.graph.input[index].name in fixed:
            del model.graph.input[index]
    return fixed


def _alias_array(array: Array, tensor: onnx.TensorProto) -> ort.OrtValue:
    """An OrtValue over an array's own memory."""
    made = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.data_type)
    assert not array.size or made.data_ptr() == array.ctypes.data
    return made


def _release_pages(weights: Mapping[str, Array]) -> None:
    """Give back the memory that mapped weights took while they were prepacked; what is read again is mapped again."""
    data: Any = next((array for array in weights.values()), None)
    while data is not None and not isinstance(data, mmap.mmap):
        data = data.obj if isinstance(data, memoryview) else data.base
    if data is not None and sys.platform == "linux":
        data.madvise(mmap.MADV_DONTNEED)
