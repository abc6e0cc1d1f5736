"""The installed library has the methods of TensorRT that lorac calls, with these parameters.

A context, an engine and a refitter are made on a GPU alone. So that neither the types that lorac is checked with nor
what stands in for them in tests can be another than the library's, both are compared with its classes.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from lorac.backends.tensorrt.device import interfaces
from lorac.backends.tensorrt.options import COMPATIBILITY_LEVELS
from tests.backends.tensorrt import engines, tiny
from tests.backends.tensorrt.tiny import LIBRARY

CLASSES: dict[type, str] = {
    interfaces.ExecutionContext: "IExecutionContext",
    interfaces.CudaEngine: "ICudaEngine",
    interfaces.Refitter: "Refitter",
}
STAND_INS: dict[type, type] = {
    interfaces.ExecutionContext: tiny.Memory,
    interfaces.CudaEngine: engines.OfNetwork,
    interfaces.Refitter: engines.Weights,
}
ONLY_RTX = {"is_stream_capturable"}


def _methods(of: type) -> dict[str, Any]:
    return {name: found for name, found in vars(of).items() if inspect.isfunction(found) and name[0] != "_"}


def _take(method: Any) -> list[str]:
    """Return the names of a method's parameters, without ``self``."""
    return list(inspect.signature(method).parameters)[1:]


def _overloads(method: Any) -> list[list[str]]:
    """Return the parameter names of each overload of a method of the bindings, from its documentation."""
    text = str(method.__doc__)
    lines = re.findall(rf"{method.__name__}\(self: [\w.]+(?:, (.*))?\) ->", text)
    assert lines, text
    return [re.findall(r"(\w+): ", re.sub(r"\[[^\]]*\]|<[^>]*>", "", line)) for line in lines]


ALL = [(of, name) for of in CLASSES for name in _methods(of)]


@pytest.mark.parametrize(("of", "name"), ALL, ids=lambda part: getattr(part, "__name__", part))
def test_a_method_is_the_librarys(of: type, name: str) -> None:
    if name in ONLY_RTX and not LIBRARY.is_rtx:
        pytest.skip("TensorRT for RTX alone has it")
    real = getattr(getattr(LIBRARY.module, CLASSES[of]), name)
    assert _take(_methods(of)[name]) in _overloads(real)


@pytest.mark.parametrize("of", CLASSES, ids=lambda of: of.__name__)
def test_an_attribute_is_the_librarys(of: type) -> None:
    for name in of.__annotations__:
        assert isinstance(inspect.getattr_static(getattr(LIBRARY.module, CLASSES[of]), name), property)


@pytest.mark.parametrize("of", CLASSES, ids=lambda of: of.__name__)
def test_a_stand_in_has_the_same_methods(of: type) -> None:
    wanted, found = _methods(of), _methods(STAND_INS[of])
    assert {name: _take(method) for name, method in found.items()}.items() >= {
        name: _take(method) for name, method in wanted.items()
    }.items()


def test_an_allocator_has_the_librarys_methods() -> None:
    """The library calls them by name, with as many arguments as its documentation says."""
    made = engines.allocator()
    text = str(LIBRARY.module.IOutputAllocator.__doc__)
    documented = {name: line.split(", ") for name, line in re.findall(r"def (\w+)\(self, ([\w, ]+)\)", text)}
    assert documented.keys() == {"reallocate_output", "reallocate_output_async", "notify_shape"}
    for name, parameters in documented.items():
        assert len(inspect.signature(getattr(made, name)).parameters) == len(parameters)


def test_declares_untyped_methods() -> None:
    """Methods that are called where no type says so."""
    trt = LIBRARY.module
    assert ["engine", "logger"] in _overloads(trt.Refitter.__init__)
    assert ["type", "ptr", "count"] in _overloads(trt.Weights.__init__)
    assert ["logger"] in _overloads(trt.Runtime.__init__)
    assert ["serialized_engine"] in _overloads(trt.Runtime.deserialize_cuda_engine)
    assert ["strategy"] in _overloads(trt.ICudaEngine.create_execution_context)
    assert ["name"] in _overloads(trt.INetworkDefinition.mark_weights_refittable)
    assert ["serialized_timing_cache"] in _overloads(trt.IBuilderConfig.create_timing_cache)
    assert ["cache", "ignore_mismatch"] in _overloads(trt.IBuilderConfig.set_timing_cache)
    assert [] in _overloads(trt.IBuilderConfig.get_timing_cache)
    assert [] in _overloads(trt.ITimingCache.serialize)
    assert {level.upper() for level in COMPATIBILITY_LEVELS} < set(trt.HardwareCompatibilityLevel.__members__)
    assert isinstance(inspect.getattr_static(trt.IBuilderConfig, "hardware_compatibility_level"), property)
    if LIBRARY.is_rtx:
        assert ["runtime_config"] in _overloads(trt.ICudaEngine.create_execution_context)
        assert ["buffer"] in _overloads(trt.Runtime.get_engine_validity)
        assert [] in _overloads(trt.ICudaEngine.create_runtime_config)
        assert [] in _overloads(trt.IRuntimeConfig.create_runtime_cache)
        assert ["cache"] in _overloads(trt.IRuntimeConfig.set_runtime_cache)
        assert ["blob"] in _overloads(trt.IRuntimeCache.deserialize)
        assert [] in _overloads(trt.IRuntimeCache.serialize)
        specialised = inspect.getattr_static(trt.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy")
        assert isinstance(specialised, property)
        assert "EAGER" in trt.DynamicShapesKernelSpecializationStrategy.__members__
