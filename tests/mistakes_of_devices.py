"""Mistakes about where a model is to run; none of the answers depends on what the machine has, but for the library."""

from __future__ import annotations

from typing import Any

import lorac
from lorac.backends.onnxruntime.options import OnnxRuntimeOptions
from tests.mistakes import Mistake, World


def _program(world: World, **rest: Any) -> Any:
    return world.again(target="onnxruntime", example_inputs=world.inputs, self_test=False, **rest)


DEVICES = [
    Mistake(
        "a device by a name that it has nowhere",
        lambda w: _program(w, device="gpu"),
        lambda w, said: w.again(),
    ),
    Mistake(
        "a GPU where ONNX Runtime is built for the CPU",
        lambda w: _program(w, device="cuda"),
        lambda w, said: _program(w, device="cpu"),
    ),
    Mistake(
        "a GPU for what was saved, where ONNX Runtime is built for the CPU",
        lambda w: lorac.load(w.path("compiled"), device="cuda:1"),
        lambda w, said: lorac.load(w.path("compiled"), device="cpu"),
    ),
    Mistake(
        "a GPU, and the provider of the CPU",
        lambda w: _program(w, device="cuda", providers=("CPUExecutionProvider",)),
        lambda w, said: OnnxRuntimeOptions(device="cuda"),
    ),
    Mistake(
        "prepacked weights for a GPU",
        lambda w: _program(w, device="cuda", prepacked="weights"),
        lambda w, said: (OnnxRuntimeOptions(device="cuda"), OnnxRuntimeOptions(device="cpu", prepacked="weights")),
    ),
    Mistake("a device that ONNX Runtime does not run on", lambda w: _program(w, device="mps")),
    Mistake(
        "a provider that is misspelt",
        lambda w: _program(w, providers=("CUDAExecutionProvder",)),
        lambda w, said: OnnxRuntimeOptions(device="cuda"),
    ),
    Mistake(
        "a cache on a GPU",
        lambda w: _program(w, device="cuda", cache=True),
        lambda w, said: (
            OnnxRuntimeOptions(device="cpu", cache=True),
            OnnxRuntimeOptions(device="cuda", cache=False),
            w.again(),
        ),
    ),
    Mistake(
        "TensorRT-RTX without the package that has it",
        lambda w: _program(w, providers=("NvTensorRTRTXExecutionProvider",)),
        lambda w, said: OnnxRuntimeOptions(device="cuda"),
    ),
]
