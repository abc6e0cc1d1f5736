"""The ops that OpenVINO computes, and passes that rewrite programs into the form that it accepts.

OpenVINO publishes no list of its ops, so this module lists those that its ONNX reader cannot translate.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import torch

from lorac.backends.onnx.export.recurrence import BY_CHUNKS
from lorac.backends.onnx.legalize import Legalize
from lorac.backends.onnx.passes import (
    OnnxDialect,
    OnnxPass,
    OpWriter,
    number_constant,
    read_numbers,
    shared_constant,
)
from lorac.backends.openvino.cached_attention import ExpandCachedAttention
from lorac.ir.graph.passes import PassResult
from lorac.ir.sites.site import SiteKind
from lorac.ir.slots.plans import RankPolicy
from lorac.target.dialect import BranchGate, Dialect

_END = int(np.iinfo(np.int64).max)


@dataclass(frozen=True)
class JoinWrappedPadding(OnnxPass):
    """Replace each ``Pad`` of mode ``wrap`` by a concatenation of last, all and first values, axis by axis.

    OpenVINO's ``Pad`` lacks that mode.
    """

    name: ClassVar[str] = "join-wrapped-padding"

    def apply(self, model: ir.Model) -> PassResult:
        """Replace the nodes in place; those with computed widths stay, and OpenVINO refuses them."""
        wrapped = [
            node
            for node in model.graph
            if node.op_type == "Pad"
            and node.attributes.get_string("mode", "") == "wrap"
            and read_numbers(node.inputs[1])
        ]
        for node in wrapped:
            _replace(model.graph, node)
        return PassResult(changed=bool(wrapped))


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    widths, value, added = read_numbers(node.inputs[1]), node.inputs[0], list[ir.Node]()
    rank = len(widths) // 2
    for axis, (before, after) in enumerate(zip(widths[:rank], widths[rank:], strict=True)):
        if before == after == 0:
            continue
        parts = [value]
        for width, start, end in ((before, -before, _END), (after, 0, after)):
            if width:  # the last values stand before all, and the first behind them
                bounds = [number_constant(graph, [n]) for n in (start, end, axis)]
                added.append(ir.Node("", "Slice", [value, *bounds]))
                parts.insert(len(parts) if start == 0 else 0, added[-1].outputs[0])
        added.append(ir.Node("", "Concat", parts, [ir.AttrInt64("axis", axis)]))
        value = added[-1].outputs[0]
    for each in added:
        each.metadata_props.update(node.metadata_props)
    assert value is not None
    value.shape, value.type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_before(node, added)
    node.outputs[0].replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


@dataclass(frozen=True)
class ComputeByChunks(OnnxPass):
    """Replace each ``If`` on the number of a call's tokens by its graph for many tokens, which accepts any number.

    OpenVINO computes conditional graphs wrongly.
    """

    name: ClassVar[str] = "compute-by-chunks"

    def apply(self, model: ir.Model) -> PassResult:
        """Replace the nodes in place."""
        found = [(node, node.attributes["else_branch"].as_graph()) for node in model.graph if node.op_type == "If"]
        chunked = [(node, branch) for node, branch in found if branch.name == BY_CHUNKS]
        for node, branch in chunked:
            taken, outputs = list(branch), list(branch.outputs)
            branch.outputs.clear()
            branch.remove(taken)
            for each in taken:
                each.metadata_props.update(node.metadata_props)
                for value in each.outputs:  # branches of other nodes have values of the same names
                    value.name = f"{node.outputs[0].name}_{value.name}"
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], taken, node.outputs, outputs)
        return PassResult(changed=bool(chunked))


@dataclass(frozen=True)
class MultiplyPatches(OnnxPass):
    """Replace each loop that convolves segments, each with its own kernel, by products of kernels and patches.

    Behind such a loop, OpenVINO 2026.4 answers wrongly once a call needs more memory than those before it. It has no
    convolution with a kernel of dynamic shape.
    """

    name: ClassVar[str] = "multiply-patches"

    def apply(self, model: ir.Model) -> PassResult:
        """Replace the nodes in place."""
        bodies = [(node, [*node.attributes["body"].as_graph()]) for node in model.graph if node.op_type == "Scan"]
        loops = [(node, body[0]) for node, body in bodies if [each.op_type for each in body] == ["Conv"]]
        for node, convolution in loops:
            write = OpWriter(model.graph)
            y = _multiply_patches(write, node, convolution)
            for each in write.tape.nodes:
                each.metadata_props.update(node.metadata_props)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], write.tape.nodes, node.outputs, [y])
        return PassResult(changed=bool(loops))


def _multiply_patches(write: OpWriter, node: ir.Node, convolution: ir.Node) -> ir.Value:
    """Write the product for segments (places, rows, C, …) and kernels (places, N, C, …).

    A convolution by channel, whose constant kernels are one at one position each, copies the patches; a kernel of one
    position reads the values as they are.
    """
    x, kernels = node.inputs
    assert x is not None and x.shape is not None and kernels is not None and kernels.shape is not None
    channels, *window = (size for size in kernels.shape[2:] if isinstance(size, int))
    positions, op = math.prod(window), write.op
    infer, features = write.numbers(-1), write.numbers(channels * positions)
    patches = op("Reshape", x, op("Concat", infer, op("Shape", x, start=2), axis=0))
    strides, pads = (convolution.attributes.get_ints(key) for key in ("strides", "pads"))
    if positions > 1 or max(strides) > 1 or any(pads):
        one_hot = np.tile(np.eye(positions, dtype=np.float32), (channels, 1)).reshape(-1, 1, *window)
        copies = shared_constant(write.graph, "_".join(map(str, ["patches", channels, *window])), one_hot)
        patches = op("Conv", patches, copies, **{**convolution.attributes, "group": ir.AttrInt64("group", channels)})
    columns = op("Reshape", patches, op("Concat", op("Shape", x, start=0, end=2), features, infer, axis=0))
    product = op("MatMul", op("Reshape", kernels, write.numbers(0, 1, -1, channels * positions)), columns)
    sizes = op("Shape", product, start=0, end=3), op("Shape", patches, start=2)
    return op("Reshape", product, op("Concat", *sizes, axis=0))


_UNTRANSLATED = """
BitCast CausalConvWithState CumProd DeformConv Det ImageDecoder LinearAttention MaxUnpool MelWeightMatrix Optional
OptionalGetElement OptionalHasElement RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase
SequenceInsert SequenceLength SequenceMap SplitToSequence ConcatFromSequence StringConcat StringNormalizer StringSplit
SwiGLU TensorScatter TfIdfVectorizer
"""
"""Ops that OpenVINO 2026.4 refuses whatever their operands, found by giving it each. Modes of other ops that it lacks
are refused where the program is read."""
_WRONG = ("If",)
"""Ops with which OpenVINO 2026.4 answers wrongly: behind a second ``If`` the first call of a larger size reads memory
that nothing has written."""
_QUANTISED = frozenset({("com.microsoft", "MatMulNBits"), ("com.microsoft", "GatherBlockQuantized")})
"""Products with codes and lookups of them, whose weights OpenVINO dequantises inside its own products."""

DIALECT: OnnxDialect = Dialect(
    name="openvino",
    claims=_QUANTISED.union(
        ("", schema.name)
        for schema in onnx.defs.get_all_schemas()
        if not schema.domain and schema.name not in (*_UNTRANSLATED.split(), *_WRONG)
    ),
    passes=(Legalize(),),
    early_rewrites=(ExpandCachedAttention(),),
    late_rewrites=(ComputeByChunks(), JoinWrappedPadding(), MultiplyPatches()),
    gates=BranchGate.WHERE,  # OpenVINO computes ``If`` wrongly
    # The CPU has no convolution with a kernel of dynamic shape; products accept rank 0.
    ranks=dict.fromkeys((SiteKind.CONV1D, SiteKind.CONV2D, SiteKind.CONV3D), RankPolicy.FIXED),
    dtypes=(torch.float32,),
    rows=True,
    why_branches_shared="its branches have one place in a program",
    functions=False,
)
