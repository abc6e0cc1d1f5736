"""Conversion of an emitted model to a TensorRT network, and checks of it before anything is built.

The parser selects an op by name regardless of its domain, and makes a constant of an input that has a value. So the
claims are checked before parsing, and afterwards the network's inputs are compared with the program's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import torch

from lorac.backends.onnx.claims import describe_origin, read_metadata
from lorac.backends.onnx.model_files import walk_nodes
from lorac.backends.tensorrt.library import TensorRTLibrary, collect_errors
from lorac.backends.tensorrt.profiles import SizeRanges
from lorac.errors import CompileError, Unavailable, list_some
from lorac.ir.graph.graph import Graph

if TYPE_CHECKING:
    import tensorrt

DYNAMIC = -1
"""The library's value for a size that varies."""
_NEXT_STEP = (
    "target='onnxruntime' and target='eager' run it; another implementation of that part of the model may be built"
)


@dataclass(frozen=True)
class ParsedNetwork:
    """A network, and the builder that keeps it alive.

    Attributes:
        library: the library that parsed it.
        network: the library's network.
        builder: the builder of the network.
    """

    library: TensorRTLibrary
    network: tensorrt.INetworkDefinition
    builder: tensorrt.Builder


def input_dtypes(graph: Graph, slots: Sequence[str], library: TensorRTLibrary) -> dict[str, torch.dtype]:
    """Return the dtype of every input of a graph, by name.

    Raises:
        Unavailable: the library lacks a dtype.
    """
    nodes = {name: name for name in graph.interface.inputs} | {name: graph.slots[name].node for name in slots}
    dtypes = {name: graph.node(node).meta["val"].dtype for name, node in nodes.items()}
    for name, dtype in dtypes.items():
        try:
            library.dtype(dtype)
        except Unavailable as error:
            raise Unavailable(f"input '{name}': {error.what}", next_step=error.next_step) from error
    return dtypes


def parse_model(path: Path, library: TensorRTLibrary) -> ParsedNetwork:
    """Parse a model into a network.

    Args:
        path: the path of the model; its weights are beside it.
        library: the library that parses it.

    Raises:
        Unavailable: the library does not support an op in this use; the message names the module.
    """
    trt, model = library.module, onnx.load(path, load_external_data=False)
    with collect_errors() as messages:
        builder = trt.Builder(library.logger)
        # Networks with the program's own dtypes; newer libraries ignore the flag.
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, library.logger)
        nodes = list(walk_nodes(model.graph))
        known = {op: bool(parser.supports_operator(op)) for op in {node.op_type for node in nodes}}
        strange = dict.fromkeys(f"{node.op_type}{_origin(node)}" for node in nodes if not known[node.op_type])
        if strange:
            raise Unavailable(
                f"{library.name_and_version} does not compute {'; nor '.join(strange)}", next_step=_NEXT_STEP
            )
        if not parser.parse_from_file(str(path)):
            named, found = {node.name: node for node in model.graph.node if node.name}, dict[str, None]()
            for error in (parser.get_error(i) for i in range(parser.num_errors)):
                origin = "" if (node := named.get(error.node_name())) is None else _origin(node)
                reason = str(error.desc()).strip().partition("\n")[0]
                found[f"{error.node_operator() or 'the program'}{origin} ({reason})"] = None
            refused = "; nor ".join(found) or f"the program: {messages.why()}"
            raise Unavailable(f"tensorrt does not take {refused}", next_step=_NEXT_STEP)
    return ParsedNetwork(library, network, builder)


def check_inputs(parsed: ParsedNetwork, dtypes: Mapping[str, torch.dtype], ranges: SizeRanges) -> None:
    """Compare a network's inputs with the program's: names, dtypes, numbers of axes, sizes.

    Args:
        dtypes: the dtypes of all inputs, by name.
        ranges: the ranges of their sizes.

    Raises:
        CompileError: naming the first inputs that differ.
    """
    network = parsed.network
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    found = {value.name: value for value in inputs}
    wanted = {name: parsed.library.dtype(dtype) for name, dtype in dtypes.items()}
    wrong = [*(found.keys() ^ wanted.keys())]
    for name in found.keys() & wanted.keys():
        sizes = tuple(found[name].shape)
        pairs = zip(sizes, ranges[name], strict=False)  # a size is dynamic where its range varies
        fits = all(size == DYNAMIC or axis.least == size == axis.most for size, axis in pairs)
        if not fits or len(sizes) != len(ranges[name]) or found[name].dtype != wanted[name]:
            wrong.append(name)
    if wrong:
        listed = list_some(wrong, 4)
        raise CompileError(
            f"{len(wrong)} inputs of the network are not those of the program: {listed}",
            next_step="this is a bug of lorac's, not of your model: a swap would have a wrong effect",
            code="self_test_failed",
        )


def _origin(node: onnx.NodeProto) -> str:
    return describe_origin(read_metadata(node))
