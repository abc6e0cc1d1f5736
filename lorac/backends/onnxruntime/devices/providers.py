"""Execution providers: the devices that they run on, and checks of a machine's requirements for them.

If a provider cannot be created, ONNX Runtime falls back to the CPU and reports it only in its log. So lorac looks for
the libraries that a provider needs before it compiles, and checks a session's providers after creating it.
"""

import contextlib
import ctypes
import functools
import importlib
import io
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import onnxruntime as ort
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from lorac.errors import Unavailable

CPU, CUDA, RTX = "CPUExecutionProvider", "CUDAExecutionProvider", "NvTensorRTRTXExecutionProvider"
ON_GPU = (CUDA, RTX, "TensorrtExecutionProvider")
"""Providers that run on an NVIDIA GPU; all others run on the CPU."""
_EXACT = {"use_tf32": "0", "enable_skip_layer_norm_strict_mode": "1"}
"""Settings with which CUDA computes as torch does by default: products and half-precision norms in float32."""
_RECORD_ASSIGNMENT = "session.record_ep_graph_assignment_info"
"""The setting with which a session records which provider computes each op."""
_PLUGINS = {RTX: ("onnxruntime_ep_nv_tensorrt_rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13")}
"""Providers in a library of their own -> the module that names the library, and its package."""
_LIBRARY_NAMES = {CUDA: "cuda", "TensorrtExecutionProvider": "tensorrt"}
"""Providers next to ONNX Runtime's own library -> the ending of their library's name."""
_DRIVER = "libcuda.so.1"
_DRIVER_LIBRARIES = (_DRIVER, "libnvidia-ml.so.1")
_MISSING_LIBRARY = re.compile(r"(\S+\.so[.\d]*): cannot open shared object file")
_CPU_ADVICE = "device='cpu' runs it on the CPU"


def device_type_of(provider: str) -> str:
    """Return the type of device that a provider runs on."""
    return "cuda" if provider in ON_GPU else "cpu"


def known_providers() -> list[str]:
    """List the providers that options may name, whether or not this machine can run them."""
    return list(dict.fromkeys([*ort.get_all_providers(), *_PLUGINS]))


def check_providers(providers: Collection[str], place: torch.device) -> None:
    """Check that this machine can create providers.

    Args:
        place: the device of the providers.

    Raises:
        Unavailable: this ONNX Runtime lacks a provider, or this machine lacks a library, the driver or the GPU.
    """
    for provider in providers:
        if provider in _PLUGINS:
            _register(provider)
        if provider not in _PLUGINS and provider not in ort.get_available_providers():
            otherwise = f"another build of ONNX Runtime has it; {_CPU_ADVICE}"
            if provider == CUDA:
                otherwise = (
                    "pip uninstall onnxruntime, then pip install --force-reinstall 'onnxruntime-gpu[cuda,cudnn]', "
                    f"which fills the same folder; {_CPU_ADVICE}"
                )
            why = ": it is built for the CPU" if provider == CUDA else ""
            raise Unavailable(f"the onnxruntime that is installed has no {provider}{why}", next_step=otherwise)
        if provider in _LIBRARY_NAMES:
            _load_provider(provider)
    if place.type == "cuda":
        _check_gpu(place.index or 0)


def start_session(
    model: bytes, settings: ort.SessionOptions, providers: Sequence[str], place: torch.device
) -> ort.InferenceSession:
    """Start a session that uses all of the given providers.

    Args:
        model: the serialised model.
        settings: ONNX Runtime's settings.
        providers: the providers, best first.
        place: the device of the providers.

    Raises:
        Unavailable: ONNX Runtime would start the session without one of the providers.
    """
    configured = []
    for name in providers:
        exact = _EXACT if name == CUDA else {}
        index = {"device_id": str(place.index)} if name in ON_GPU and place.index else {}
        configured.append((name, exact | index))
    if place.type != "cpu":
        settings.add_session_config_entry(_RECORD_ASSIGNMENT, "1")
    plugins = _PLUGINS.keys() & set(providers)
    for name, options in configured if plugins else ():  # providers in separate libraries are selected by their devices
        if name in _PLUGINS:
            settings.add_provider_for_devices(_devices(name, place), {})
        elif name != CPU:
            settings.add_provider(name, options)
    session = ort.InferenceSession(model, settings, providers=None if plugins else configured)
    left_out = [provider for provider in providers if provider not in session.get_providers()]
    if left_out:
        raise Unavailable(
            f"onnxruntime could not start {', '.join(left_out)}, and would run on {session.get_providers()[0]} instead",
            next_step=f"onnxruntime's log says why; {_CPU_ADVICE}",
        )
    return session


def ops_on_cpu(session: ort.InferenceSession) -> dict[str, int]:
    """Return op -> number of nodes that the CPU computes in a session on a GPU; empty for a session on the CPU."""
    if not set(session.get_providers()) & set(ON_GPU):
        return {}
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name == CPU]
    return dict(sorted(Counter(node.op_type for part in parts for node in part.get_nodes()).items()))


@functools.cache
def _load_provider(provider: str) -> None:
    """Load a provider's library, and CUDA and cuDNN from pip's folders, which no loader searches.

    Raises:
        Unavailable: naming the library that is missing.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    if sys.platform != "linux":
        return
    home = Path(ort.__file__).parent / "capi"
    try:
        ctypes.CDLL(str(home / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(home / f"libonnxruntime_providers_{_LIBRARY_NAMES[provider]}.so"))
    except OSError as error:
        raise _unloadable(provider, error) from error


def _unloadable(provider: str, error: Exception) -> Unavailable:
    found = _MISSING_LIBRARY.search(str(error))
    if found and found.group(1) in _DRIVER_LIBRARIES:
        return Unavailable(
            f"{provider} needs {found.group(1)}, a part of NVIDIA's driver, and this machine has no driver",
            next_step=f"install the GPU's driver, or hand it into the container (docker run --gpus all); {_CPU_ADVICE}",
        )
    lacking = (
        f"needs the library {found.group(1)}, which is not found"
        if found
        else f"cannot be loaded: {str(error).strip().partition(chr(10))[0]}"
    )
    return Unavailable(
        f"{provider} {lacking}", next_step=f'pip install "lorac[cuda]" brings CUDA and cuDNN; {_CPU_ADVICE}'
    )


def _check_gpu(index: int) -> None:
    """Refuse a GPU index that the driver does not list."""
    if sys.platform != "linux":
        return
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise _unloadable(CUDA, error) from error
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        count.value = 0
    if index >= count.value:
        visible = f"{count.value} GPUs, from 0 on" if count.value else "no GPU"
        raise Unavailable(
            f"there is no device 'cuda:{index}': NVIDIA's driver shows {visible}",
            next_step=f"{'give one of these' if count.value else 'CUDA_VISIBLE_DEVICES may hide them'}; {_CPU_ADVICE}",
        )


def _devices(provider: str, place: torch.device) -> list[ort.OrtEpDevice]:
    """Return the device of a provider that comes in a separate library."""
    found = [device for device in ort.get_ep_devices() if device.ep_name == provider]
    return found[place.index or 0 :][:1]


@functools.cache
def _register(provider: str) -> None:
    """Register a provider's library with ONNX Runtime."""
    name, package = _PLUGINS[provider]
    try:
        library = importlib.import_module(name).get_library_path()
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"{provider} comes with the package {package}, which is not installed",
            next_step=f"pip install {package}, or give device='cuda' alone for {CUDA}",
        ) from error
    try:
        ort.register_execution_provider_library(provider, library)
    except Fail as error:
        raise _unloadable(provider, error) from error
