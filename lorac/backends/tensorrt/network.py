"""From an emitted model to a network of TensorRT's, and what is held against it before anything is built.

The parser takes an op by its name whatever its domain, and makes a constant of an input that has a value. So the claims
are checked before it parses, and afterwards the network's inputs are held against those that were to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from lorac.backends.onnx.claims import describe_origin
from lorac.backends.onnx.model_files import walk_subgraphs
from lorac.backends.tensorrt import library
from lorac.backends.tensorrt.profiles import SizeRange, SizeRanges
from lorac.errors import CompileError, Unavailable
from lorac.ir.graph.graph import Graph

DYNAMIC = -1
"""How the library writes a size that varies."""
_NEXT_STEP = (
    "target='onnxruntime' and target='eager' run it; another implementation of that part of the model may be built"
)


@dataclass(frozen=True)
class ParsedNetwork:
    """A network, and what keeps it alive.

    Attributes:
        network: the library's.
        builder: made it, and builds it.
    """

    network: Any
    builder: Any


def input_dtypes(graph: Graph, slots: Sequence[str]) -> dict[str, torch.dtype]:
    """The dtype of every input of a graph, by name.

    Raises:
        Unavailable: the library has none like it.
    """
    nodes = {name: name for name in graph.interface.inputs} | {name: graph.slots[name].node for name in slots}
    found = {name: graph.node(node).meta["val"].dtype for name, node in nodes.items()}
    for name, dtype in found.items():
        try:
            library.trt_dtype(dtype)
        except Unavailable as error:
            raise Unavailable(f"input '{name}': {error.what}", next_step=error.next_step) from error
    return found


def parse_model(path: Path) -> ParsedNetwork:
    """The network of a model.

    Args:
        path: the model; its weights lie beside it.

    Raises:
        Unavailable: the library does not take an op, as it is used here; named with the module that asks for it.
    """
    trt, model = library.trt(), onnx.load(path, load_external_data=False)
    with library.collect_errors() as said:
        builder = trt.Builder(library.logger())
        network = builder.create_network(_strongly_typed(trt))
        parser = trt.OnnxParser(network, library.logger())
        _check_operators(model, parser)
        if not parser.parse_from_file(str(path)):
            refused = "; nor ".join(_parser_errors(model, parser)) or f"the program: {said.why()}"
            raise Unavailable(f"tensorrt does not take {refused}", next_step=_NEXT_STEP)
    return ParsedNetwork(network, builder)


def check_inputs(parsed: ParsedNetwork, dtypes: Mapping[str, torch.dtype], ranges: SizeRanges) -> None:
    """Hold a network's inputs against those that were to be: names, dtypes, numbers of axes, sizes.

    Args:
        parsed: the network.
        dtypes: by name, of all inputs.
        ranges: of their sizes.

    Raises:
        CompileError: naming the first inputs that differ.
    """
    network = parsed.network
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    found = {value.name: value for value in inputs}
    wanted = {name: library.trt_dtype(dtype) for name, dtype in dtypes.items()}
    wrong = [*(found.keys() ^ wanted.keys())]
    wrong += [
        n
        for n in found.keys() & wanted.keys()
        if found[n].dtype != wanted[n] or not _matches_ranges(found[n], ranges[n])
    ]
    if wrong:
        told = ", ".join(f"'{name}'" for name in wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CompileError(
            f"{len(wrong)} inputs of the network are not those of the program: {told}",
            next_step="this is a bug of the emitter, not of your model; a swap would not do what it says",
            code="self_test_failed",
        )


def _matches_ranges(value: Any, axes: Sequence[SizeRange]) -> bool:
    """Whether an input of a network has these sizes: one that varies is free, and one that does not may be fixed."""
    sizes = tuple(value.shape)
    if len(sizes) != len(axes):
        return False
    return all(size == DYNAMIC or axis.least == size == axis.most for size, axis in zip(sizes, axes, strict=True))


def _strongly_typed(trt: Any) -> int:
    """The flag for networks whose dtypes are the program's own; libraries that know nothing else ignore it."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _check_operators(model: onnx.ModelProto, parser: Any) -> None:
    """Refuse ops that this release's parser does not know, all of them."""
    nodes = [node for graph in (model.graph, *walk_subgraphs(model.graph)) for node in graph.node]
    known = {op: bool(parser.supports_operator(op)) for op in {node.op_type for node in nodes}}
    strange = dict.fromkeys(f"{node.op_type}{_origin(node)}" for node in nodes if not known[node.op_type])
    if strange:
        raise Unavailable(
            f"tensorrt {library.version()} does not compute {'; nor '.join(strange)}", next_step=_NEXT_STEP
        )


def _parser_errors(model: onnx.ModelProto, parser: Any) -> list[str]:
    """What the parser did not take, each with who asks for it and the parser's reason."""
    nodes = {node.name: node for node in model.graph.node if node.name}
    found: dict[str, None] = {}
    for error in (parser.get_error(i) for i in range(parser.num_errors)):
        node = nodes.get(error.node_name())
        reason = str(error.desc()).strip().partition("\n")[0]
        found[f"{error.node_operator() or 'the program'}{'' if node is None else _origin(node)} ({reason})"] = None
    return list(found)


def _origin(node: onnx.NodeProto) -> str:
    return describe_origin({entry.key: entry.value for entry in node.metadata_props})
