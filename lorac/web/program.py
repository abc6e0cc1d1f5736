"""The program of a page: an artifact's graph rewritten for onnxruntime-web, and its weights in pieces.

onnxruntime-web has an older version of cached attention, without lengths per row, so a page has one row. Its
WebAssembly has no kernel for quantised products and would dequantise every weight in every call. So a second graph
dequantises the weights when it is loaded, by ops that are folded into constants; its products are those of
``accuracy_level=1``, which round nothing.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save

from lorac.argument_types import JsonMapping
from lorac.backends.onnx.model_files import MAX_LENGTH_KEY, NEUTRAL_FILE, read_model_files, walk_nodes
from lorac.errors import Unavailable
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.graph.attention_ops import IDS, LOGITS_TO_KEEP, NEW_LENGTHS, PAST_LENGTHS, is_past_input
from lorac.storage.open_file import OpenFile

_MICROSOFT = "com.microsoft"
_LARGEST_TENSOR = (1 << 31) - (1 << 16)  # the most bytes of an array in every browser
_LARGEST_FILE = 1 << 30  # bytes of weights that a page holds in one array, unless one tensor has more
_ALIGNMENT = 64
_OPERANDS = 16  # the number that onnxruntime-web's attention over a cache takes
_BLOCKED_OPSET = 21  # the first whose DequantizeLinear has blocks
_CODES = {4: (TensorProto.UINT4, b"\x88"), 8: (TensorProto.UINT8, b"\x80")}
"""Bits of a code -> its type, and bytes whose codes are the middle of the range: the zero points of most products."""
_INPUT_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}


def read_program(files: Mapping[str, OpenFile], described: Sequence[JsonMapping]) -> dict[str, Any]:
    """Return the program of an artifact with one graph.

    ``graphs`` has ``float``, whose weights are floating-point numbers after loading, and for quantised products
    ``codes``, which multiplies by codes. ``float_bytes`` is the size of the dequantised weights. ``weights`` has the
    pieces of each file that graphs read; ``neutral`` has the slots without an adapter, as safetensors. ``slots`` has
    each slot's role, sites and rank axis, or -1. ``limit`` is the maximum number of tokens of a text, or None.

    Args:
        files: the files of the artifact, by name.
        described: the manifest's entries for its slots.

    Raises:
        ArtifactError: as ``read_model_files``.
        Unavailable: a page cannot provide an input of the program, or cannot store one of its tensors.
    """
    model, weights = read_model_files(files, MAIN_GRAPH)
    known = {str(slot["name"]): slot for slot in described}
    _check_inputs(model, known)
    defaults = {}  # browsers do not support them
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in known]:
        value = weights[tensor.name] if tensor.name in weights else onnx.numpy_helper.to_array(tensor)
        defaults[tensor.name] = np.ascontiguousarray(value)
        model.graph.initializer.remove(tensor)
    neutral = files[NEUTRAL_FILE].read() if NEUTRAL_FILE in files else save(defaults)
    for node in walk_nodes(model.graph):
        if node.op_type == "GroupQueryAttention":
            del node.input[_OPERANDS:]
    held = _place_weights(model, weights)
    floats = copy.deepcopy(model)
    float_bytes = _dequantise(floats)
    slots = {}
    for value in model.graph.input:
        if value.name in known:
            slot, dims = known[value.name], value.type.tensor_type.shape.dim
            rank = next((axis for axis, dim in enumerate(dims) if dim.dim_param.endswith(":rank")), -1)
            slots[value.name] = {"role": slot["role"], "sites": slot["members"] or [slot["site"]], "rank": rank}
    graphs = {"float": floats, "codes": model} if float_bytes else {"float": floats}
    return {
        "graphs": {name: graph.SerializeToString() for name, graph in graphs.items()},
        "float_bytes": float_bytes,
        "weights": held,
        "neutral": neutral,
        "slots": slots,
        "limit": next((int(entry.value) for entry in model.metadata_props if entry.key == MAX_LENGTH_KEY), None),
    }


def _check_inputs(model: onnx.ModelProto, slots: Mapping[str, object]) -> None:
    """Refuse a program without a cache, or with inputs that a text page cannot provide."""
    inputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    if PAST_LENGTHS not in inputs:
        raise Unavailable("the program keeps no cache, which a page needs", next_step="compile with cache=True")
    for name, dtype in inputs.items():
        if name not in {IDS, LOGITS_TO_KEEP, NEW_LENGTHS, PAST_LENGTHS, *slots} and not is_past_input(name):
            raise Unavailable(
                f"the program also takes '{name}', but a page gives only tokens",
                next_step="export a model that reads only text",
            )
        if dtype not in _INPUT_TYPES:
            raise Unavailable(
                f"'{name}' is {TensorProto.DataType.Name(dtype).lower()}, which browsers do not compute in",
                next_step="compile the model with dtype='float32'",
            )


def _place_weights(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> dict[str, list[bytes | memoryview]]:
    """Move the weights of a graph to files of sizes that browsers can store; return the pieces of each file by name."""
    files: dict[str, list[bytes | memoryview]] = {}
    places: dict[tuple[int, int], tuple[str, int]] = {}
    size = _LARGEST_FILE  # a full file, so that the first weight starts a new one
    for tensor, values in [(t, weights[t.name]) for t in model.graph.initializer if t.name in weights]:
        if values.nbytes > _LARGEST_TENSOR:
            raise Unavailable(
                f"the weight '{tensor.name}' has {values.nbytes} bytes, and arrays of browsers less than 2 GiB",
                next_step="compile with weights='int8' or weights='int4'",
            )
        key = (values.__array_interface__["data"][0], values.nbytes)  # tied weights share an address
        if key not in places:
            if size + values.nbytes > _LARGEST_FILE:
                size = 0
                files[f"weights{len(files)}"] = []
            name = next(reversed(files))
            padding = -values.nbytes % _ALIGNMENT
            files[name] += [np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, bytes(padding)]
            places[key] = (name, size)
            size += values.nbytes + padding
        del tensor.external_data[:]
        for entry, value in zip(("location", "offset", "length"), (*places[key], values.nbytes), strict=True):
            tensor.external_data.add(key=entry, value=str(value))
    return files


def _dequantise(model: onnx.ModelProto) -> int:
    """Replace products with codes by products with dequantised weights; return the size of these weights in bytes."""
    graph, size, nodes = model.graph, 0, []
    known = {tensor.name: tensor for tensor in graph.initializer}

    def view(name: str, kind: str, dtype: int, *dims: int) -> str:
        """Return the name of a tensor that has the bytes of another one, and its own dims."""
        if (alias := f"{name}:{kind}") not in known:
            known[alias] = tensor = copy.deepcopy(known[name])
            tensor.name, tensor.data_type, tensor.dims[:] = alias, dtype, dims
        return alias

    for node in graph.node:
        if node.op_type != "MatMulNBits":
            nodes.append(node)
            continue
        numbers = {entry.name: entry.i for entry in node.attribute}
        bits, block, rows, width = numbers.get("bits", 4), numbers["block_size"], numbers["N"], numbers["K"]
        x, codes, scales, zeros, order, bias = [*node.input, "", "", ""][:6]
        blocks = -(-width // block)
        fits = width % block == 0 and not order and {codes, scales} <= known.keys()
        if bits not in _CODES or not fits or (zeros and (known[zeros].data_type != TensorProto.UINT8 or blocks % 2)):
            nodes.append(node)
            continue
        if not zeros:
            zeros, data = f"zeros:{bits}:{rows * blocks}", _CODES[bits][1] * ((rows * blocks * bits + 7) // 8)
            known[zeros] = TensorProto(name=zeros, dims=[len(data)], data_type=TensorProto.UINT8, raw_data=data)
        read = [
            view(codes, "codes", _CODES[bits][0], rows, width),
            view(scales, "blocks", known[scales].data_type, rows, blocks),
            view(zeros, f"{rows}:{blocks}", _CODES[bits][0], rows, blocks),
        ]
        weight, output = f"{node.output[0]}:weight", f"{node.output[0]}:product" if bias else node.output[0]
        nodes += [
            helper.make_node("DequantizeLinear", read, [weight], axis=1, block_size=block),
            helper.make_node("FusedMatMul", [x, weight], [output], domain=_MICROSOFT, transB=1),
            *([helper.make_node("Add", [output, bias], node.output)] if bias else []),
        ]
        size += 4 * rows * width
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    names = {name for node in walk_nodes(graph) for name in node.input} | {value.name for value in graph.output}
    graph.initializer.extend(tensor for name, tensor in known.items() if name in names)
    for opset in model.opset_import:
        opset.version = max(opset.version, _BLOCKED_OPSET) if not opset.domain and size else opset.version
    return size
