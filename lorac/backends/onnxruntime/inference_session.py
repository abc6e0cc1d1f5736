"""Sessions over the open files of a program, always created with the same settings."""

import dataclasses
import functools
import hashlib
import mmap
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from lorac.backends.onnx.model_files import WEIGHTS_FILE, Array, graph_file, read_model_files, walk_nodes
from lorac.backends.onnx.quantised.codec import ACCURACY_ATTRIBUTE, FLOAT32_LEVEL
from lorac.backends.onnxruntime.devices.providers import start_session
from lorac.backends.onnxruntime.native_op import use_native_op
from lorac.backends.onnxruntime.options import FLOAT16, OnnxRuntimeOptions
from lorac.backends.onnxruntime.prepacked import keep_optimised, open_prepacked, write_prepacked
from lorac.frontend.components import MAIN_GRAPH
from lorac.native_library import NativeLibrary
from lorac.storage.open_file import OpenFile
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
    """Convert the target's options to ONNX Runtime's settings."""
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

    Args:
        files: the open files of the program.
        constants: slot input -> its constant content in this session; the session references it, without a copy.
        rounds: whether products with quantised weights may round their operands as the model says; otherwise they
            compute in float32.

    Raises:
        ArtifactError: a weight is not at the offset that the model gives.
        Unavailable: an op has no kernel in the model's dtype.
    """
    model, weights = read_model_files(files, graph)
    attributes = () if rounds else (attribute for node in walk_nodes(model.graph) for attribute in node.attribute)
    for attribute in attributes:
        if attribute.name == ACCURACY_ATTRIBUTE:
            attribute.i = FLOAT32_LEVEL
    library = options.native_library
    layers = use_native_op(model, half=options.native == FLOAT16) if library is not None else 0
    fixed = _make_constants(model, constants or {})
    source = _SessionSource(
        model=model,
        weights={name: array for name, array in weights.items() if name not in fixed},
        file=files.get(graph_file(graph, WEIGHTS_FILE)),
        constants=fixed,
        library=library if layers else None,
        native_layers=layers,
    )
    if options.prepacked is None or constants is not None or not rounds:
        return source.start(options)
    folder = Path(options.prepacked)
    packed = open_prepacked(folder, source.digest(), functools.partial(source.write_prepacked, options))
    return source.start(options) if packed is None else source.start_prepacked(packed, options)


def create_settled_session(
    files: ProgramFiles, graph: str, tensors: Mapping[str, torch.Tensor], options: OnnxRuntimeOptions
) -> ort.InferenceSession:
    """Create a session with slots as constants; it has copies, so later writes do not affect it."""
    copies = {name: tensor.detach().to("cpu", copy=True).numpy() for name, tensor in tensors.items()}
    return create_session(files, graph, options, copies)


@dataclass(frozen=True, eq=False, kw_only=True)
class _SessionSource:
    """A graph's model in the form for sessions, with this machine's custom ops.

    Attributes:
        weights: name -> memory-mapped content in the file of weights.
        file: the file of weights; None if there is none.
        constants: name -> content that is passed to the session in memory.
        library: the library with the kernels of custom ops; None if the model uses none.
        native_layers: the number of layers that such ops compute.
    """

    model: onnx.ModelProto
    weights: Mapping[str, Array]
    file: OpenFile | None
    constants: Mapping[str, Array]
    library: NativeLibrary | None
    native_layers: int

    def start(
        self, options: OnnxRuntimeOptions, prepare: Callable[[ort.SessionOptions], None] = lambda _: None
    ) -> ort.InferenceSession:
        """Start a session.

        ONNX Runtime gets the model's bytes, and maps the weights by a path that refers to the open file, even if
        another process replaces the file. ONNX Runtime refuses that path once the file is deleted; then the mapped
        weights are passed in memory, and ONNX Runtime copies those that it does not prepack.

        Args:
            prepare: a function that adds to ONNX Runtime's settings.
        """
        if self.file is None or not self.file.is_linked:
            return self._start(options, None, prepare)
        try:
            return self._start(options, self.file.path, prepare)
        except Fail:
            if self.file.is_linked:
                raise
            return self._start(options, None, prepare)  # the file was deleted in the meantime

    def digest(self) -> str:
        """Return a hash of the model and its weights."""
        found = hashlib.blake2b(self.model.SerializeToString(deterministic=True), digest_size=16)
        found.update(b"" if self.file is None else self.file.digest().encode())
        return found.hexdigest()

    def write_prepacked(self, options: OnnxRuntimeOptions, folder: Path) -> None:
        """Write the optimised model and its prepacked weights into a folder."""
        self.start(options, functools.partial(write_prepacked, folder=folder))

    def start_prepacked(self, files: ProgramFiles, options: OnnxRuntimeOptions) -> ort.InferenceSession:
        """Start a session from the files of ``write_prepacked``."""
        model, weights = read_model_files(files, MAIN_GRAPH)
        packed = dataclasses.replace(self, model=model, weights=weights, file=files.get(WEIGHTS_FILE))
        session = packed.start(options, keep_optimised)
        session.lorac_prepacked = True
        return session

    def _start(
        self, options: OnnxRuntimeOptions, path: Path | None, prepare: Callable[[ort.SessionOptions], None]
    ) -> ort.InferenceSession:
        """Start a session that maps its weights from a path; without a path, pass the weights in memory."""
        settings = session_options(options)
        prepare(settings)
        if self.library is not None:
            settings.register_custom_ops_library(self.library.path)
        stored = {tensor.name: tensor for tensor in self.model.graph.initializer}
        handed = {**self.constants, **({} if path is not None else self.weights)}
        if path is not None:
            for entry in (entry for name in self.weights for entry in stored[name].external_data):
                if entry.key == "location":
                    entry.value = path.relative_to(path.anchor).as_posix()
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", path.anchor)
        alias = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
        values = [alias(array, stored[name].data_type) for name, array in handed.items()]
        arrays = zip(values, handed.values(), strict=True)
        assert all(not array.size or value.data_ptr() == array.ctypes.data for value, array in arrays)
        settings.add_external_initializers(list(handed), values)
        try:
            session = start_session(self.model.SerializeToString(), settings, options.chosen, options.place)
        except NoKernel as error:
            from lorac.backends.onnxruntime.missing_kernel import missing_kernel_error

            raise missing_kernel_error(self.model, error) from error
        session.lorac_constants = handed  # the session reads the arrays as long as it exists
        session.lorac_native_layers = self.native_layers
        session.lorac_prepacked = False
        # Release the memory of mapped weights, which are prepacked now; pages that are read later are mapped again.
        mapped: object = next(iter(self.weights.values()), None)
        while mapped is not None and not isinstance(mapped, mmap.mmap):
            mapped = mapped.obj if isinstance(mapped, memoryview) else getattr(mapped, "base", None)
        if mapped is not None and sys.platform == "linux":
            mapped.madvise(mmap.MADV_DONTNEED)
        return session


def _make_constants(model: onnx.ModelProto, constants: Mapping[str, Array]) -> dict[str, Array]:
    """Turn slot inputs into constants that are passed in memory; return those that the model has."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
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
