"""Attention to a cache, as an op of lorac's own in an emitted program: a target puts its own op in its place.

ONNX has no op that takes rows of different lengths. No target claims this one, so that a program in which one is left
is refused.
"""

from __future__ import annotations

import functools
from typing import Any

from onnx import defs
from onnxscript.values import Op, Opset

DOMAIN = "lorac"
NAME = "CachedAttention"
_FLOATS, _LENGTHS, _PLACES = "T", "L", "P"
_OPERANDS = {
    **dict.fromkeys(("q", "k", "v", "past_k", "past_v"), _FLOATS),
    **dict.fromkeys(("past", "new"), _LENGTHS),
    "places": _PLACES,
    "sinks": _FLOATS,
}
_RESULTS = ("y", "present_k", "present_v")
_ATTRIBUTES = {
    "scale": defs.OpSchema.AttrType.FLOAT,
    "window": defs.OpSchema.AttrType.INT,
    "softcap": defs.OpSchema.AttrType.FLOAT,
}


def cached_attention(*operands: Any) -> Any:
    """``lorac::cached_attention`` as that op; the module's path every node bears anyway."""
    *tensors, scale, window, softcap, _ = operands
    return _op()(*tensors, scale=scale, window=window, softcap=softcap)


@functools.cache
def _op() -> Op:
    """The op, its schema made known to onnx."""
    parameter, options = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption
    single, optional = options.Single, options.Optional
    schema = defs.OpSchema(
        NAME,
        DOMAIN,
        1,
        inputs=[
            parameter(name, kind, param_option=optional if name == "sinks" else single)
            for name, kind in _OPERANDS.items()
        ],
        outputs=[parameter(name, _FLOATS) for name in _RESULTS],
        type_constraints=[
            (_FLOATS, ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], ""),
            (_LENGTHS, ["tensor(int32)"], ""),
            (_PLACES, ["tensor(int64)"], ""),
        ],
        attributes=[defs.OpSchema.Attribute(name, kind) for name, kind in _ATTRIBUTES.items()],
    )
    if not defs.has(NAME, DOMAIN):
        defs.register_schema(schema)
    return Op(Opset(DOMAIN, 1), NAME, schema)
