"""Runs the op of lorac-native in malformed models: inputs, outputs, attributes and shapes that do not go together.

The op refuses them, or answers; found is what ends the process. The library is that of the installed package, or else
is built. To see what is read or written beyond a buffer, have Python find a package that was built with
``-DCMAKE_CXX_FLAGS=-fsanitize=address``, and preload ``libasan.so``.
"""

from __future__ import annotations

import functools
import math
import os
import random
from pathlib import Path

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from campaigns.op_calls import LATEST
from lorac.backends.onnxruntime.native_op import DOMAIN, OP
from lorac.native_library import OP_VERSION

CALLS = 50
"""Models of a case."""
LONG = 1 << 58
TYPES = {
    np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16, np.int32: TensorProto.INT32,
    np.int64: TensorProto.INT64, np.float64: TensorProto.DOUBLE,
}  # fmt: skip
NUMBERS = (-(1 << 63), -3, -1, 0, 1, 2, 3, 6, 9, 1 << 31, 1 << 40, (1 << 63) - 1)


@functools.cache
def find_library() -> str:
    """Return the path of the library, which is built if no package is installed."""
    try:
        import lorac_native  # type: ignore[import-not-found, unused-ignore]

        return str(lorac_native.LIBRARY)
    except ImportError:
        from tests.native.library import PACKAGE, build_package

        return str(build_package() / PACKAGE / "liblorac_native.so")


def run(chance: random.Random, folder: Path) -> None:
    """Run the models of one case; the file ``call.txt`` of the folder names the latest one."""
    latest = os.open(folder / LATEST, os.O_WRONLY | os.O_CREAT)
    try:
        for _ in range(CALLS):
            feeds, widths, parts, outputs = _draw(chance)
            shapes = {name: (array.shape, array.dtype.name) for name, array in feeds.items()}
            text = f"{shapes} widths={widths} parts={parts} outputs={outputs}"
            os.pwrite(latest, text[:2000].ljust(2000).encode(), 0)
            try:
                _answer(feeds, widths, parts, outputs)
            except Exception:  # ONNX Runtime's, which has errors of its own for each
                continue
    finally:
        os.close(latest)


def _answer(feeds: dict[str, np.ndarray], widths: list[int], parts: list[int], outputs: list[str]) -> None:
    given = [helper.make_tensor_value_info(name, TYPES[array.dtype.type], None) for name, array in feeds.items()]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name]
    node = helper.make_node(OP, [*feeds], outputs, domain=DOMAIN, widths=widths, parts=parts)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, OP_VERSION)]
    model = helper.make_model(helper.make_graph([node], "node", given, made), opset_imports=opsets, ir_version=10)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    settings.register_custom_ops_library(find_library())
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    session.run(None, feeds)


def _draw(chance: random.Random) -> tuple[dict[str, np.ndarray], list[int], list[int], list[str]]:
    """Return a sound node's inputs, attributes and outputs, of which up to three are others."""
    layers, places = chance.choice((1, 1, 2, 3)), chance.choice((1, 1, 2, 4))
    rows, features = chance.choice((4, 8)), chance.choice((1, 8, 17))
    widths = [chance.choice((0, 1, 3, 6)) for _ in range(layers)]
    parts = [chance.randrange(32) for _ in range(layers)]
    shapes: dict[str, tuple[int, ...]] = {"x": (places, rows // places, features), "base": (rows, sum(widths))}
    half = chance.random() < 0.2
    types = {}
    for i, (width, part) in enumerate(zip(widths, parts, strict=True)):
        rank = chance.choice((0, 1, 2, 5)) if part & 1 else 0
        if part & 1:
            shapes |= {f"a{i}": (places, features, rank), f"b{i}": (places, rank, width)}
            types |= dict.fromkeys((f"a{i}", f"b{i}"), np.float16 if half else np.float32)
        sizes = {2: rank, 4: width, 8: width}
        shapes |= {f"s{i}.{bit}": (places, 1, size) for bit, size in sizes.items() if part & bit}
        shapes |= {f"r{i}": (rows, width)} if part & 16 else {}
    if chance.random() < 0.3:
        shapes["counts"], types["counts"] = (places,), np.int32
    outputs = ["y"] if chance.random() < 0.3 else [f"y{i}" for i in range(layers)]
    for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
        name, how = chance.choice([*shapes]), chance.randrange(8)
        if how == 0:
            shapes[name] = tuple(chance.choice((0, 1, size, size + 1, LONG)) for size in shapes[name])
        elif how == 1:
            shapes[name] = chance.choice((shapes[name][::-1], shapes[name][1:], (1, *shapes[name]), ()))
        elif how == 2 and len(shapes) > 1:
            shapes.pop(name)
        elif how == 3:
            shapes[f"more{len(shapes)}"] = chance.choice([*shapes.values()])
        elif how == 4:
            types[name] = chance.choice([*TYPES])
        elif how == 5:
            changed = chance.choice((widths, parts))
            changed[-1:] = [chance.choice(NUMBERS)]
        elif how == 6:
            changed = chance.choice((widths, parts))
            changed[:] = chance.choice((changed[:-1], [*changed, chance.choice(NUMBERS)]))
        else:
            outputs = chance.choice((outputs[:-1], [*outputs, "more"], ["", *outputs[1:]], [*outputs[:-1], ""]))
    return (
        {name: _array(shape, types.get(name, np.float32), chance) for name, shape in shapes.items()},
        widths,
        parts,
        outputs,
    )


def _array(shape: tuple[int, ...], kind: type, chance: random.Random) -> np.ndarray:
    # Nothing stands behind a size that long, unless another is 0, and NumPy takes no product far beyond it.
    if 0 not in shape or math.prod(max(length, 1) for length in shape) > LONG:
        shape = tuple(min(length, 9) for length in shape)
    fill = chance.choice((1, 1, 2, -1, 2**31 - 1)) if kind in (np.int32, np.int64) else 1
    return np.full(shape, fill, kind)
