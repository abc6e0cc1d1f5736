"""Opsets of ONNX whose ops are recorded only for the calling context.

onnxscript's opsets record in ``onnxscript.evaluator.default()``, a global variable, so one thread's export may record
the ops of another. An opset here records in a context variable. If that has no recorder, it calls onnxscript's
evaluator, as ``torch.onnx.export`` expects of a translation.
"""

import functools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import onnx
import onnx_ir as ir
from onnxscript import opset18
from onnxscript.values import Op, Opset

Outputs = ir.Value | Sequence[ir.Value]
"""Outputs of an op: a single value, or a sequence."""


class NodeRecorder(Protocol):
    """A recorder of nodes."""

    def record(self, schema: onnx.defs.OpSchema, /, *inputs: object, **attributes: object) -> Outputs:
        """Record a node and return its outputs."""


_recorder: ContextVar[NodeRecorder | None] = ContextVar("recorder", default=None)


@contextmanager
def record_with(recorder: NodeRecorder) -> Iterator[None]:
    """Use a recorder for the ops that are called within the block in this context."""
    token = _recorder.set(recorder)
    try:
        yield
    finally:
        _recorder.reset(token)


def current_recorder() -> NodeRecorder | None:
    """Return the recorder of the calling context."""
    return _recorder.get()


class RecordedOp:
    """An op that the recorder of the calling context records.

    Args:
        name: the name of the op.
        schema: its inputs and attributes.
    """

    def __init__(self, opset: "RecordingOpset | Opset", name: str, schema: onnx.defs.OpSchema) -> None:
        self.opset, self.name, self.schema = opset, name, schema

    def __call__(self, *args: object, **kwargs: object) -> Outputs:
        """Record the op, and return its outputs."""
        recorder = _recorder.get()
        if recorder is not None:
            return recorder.record(self.schema, *args, **kwargs)
        opset = self.opset.original if isinstance(self.opset, RecordingOpset) else self.opset
        outputs: Outputs = Op(opset, self.name, self.schema)(*args, **kwargs)
        return outputs


class RecordingOpset:
    """An opset whose ops are recorded for the calling context.

    Args:
        original: onnxscript's opset. Its methods are called unchanged, since they fill in defaults of attributes.
    """

    _prepare_inputs = Opset._prepare_inputs

    def __init__(self, original: Opset) -> None:
        self.original, self.domain, self.version = original, original.domain, original.version

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(type(self.original), name, None)
        found = (
            RecordedOp(self, name, _read_schema(name, self.version, self.domain))
            if method is None
            else types.MethodType(rebind(method, _recorded_names(method.__module__)), self)
        )
        vars(self)[name] = found
        return found


def rebind(function: types.FunctionType, names: dict[str, object]) -> types.FunctionType:
    """Return a copy of a function that looks up globals in ``names``."""
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@functools.cache
def _recorded_names(module: str) -> dict[str, object]:
    """Return a copy of the globals of an onnxscript opset module, in which ops are recorded."""
    return {**vars(sys.modules[module]), "Op": RecordedOp, "get_schema": _read_schema}


_read_schema = functools.cache(onnx.defs.get_schema)
op = RecordingOpset(opset18)
"""The opset that translations write, torch's and lorac's own."""
