"""From a lowered graph to an ONNX model on disk: one emitter for all modes.

Slots stay true inputs. Weights go beside the model as external data, so that models over 2 GB work and ONNX Runtime
maps them instead of reading them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import torch
from onnxscript import rewriter
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from onnxscript.rewriter.ort_fusions.rms_normalization import rms_normalization_rules

from lorac.backends.onnxruntime.attention import rotary_rules
from lorac.backends.onnxruntime.exporter import export, quiet
from lorac.backends.onnxruntime.gate import gate_branches
from lorac.backends.onnxruntime.rows import to_rows
from lorac.backends.onnxruntime.translate import TRANSLATIONS, legalize, settle
from lorac.ir.graph.graph import Graph

MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
SITE_METADATA = "lorac.site"


def emit(graph: Graph, folder: Path, constants: Mapping[str, torch.Tensor] | None = None) -> Path:
    """Write ``model.onnx`` and its weights.

    Args:
        graph: at level expanded.
        folder: where to write.
        constants: slot name -> value: these slots become constants instead of inputs (baked mode).

    Returns:
        The model's path.
    """
    legalize(graph)
    model = to_onnx(graph)
    if constants is not None:
        bake(model, constants)
    path = folder / MODEL
    ir.save(model, path, external_data=WEIGHTS, size_threshold_bytes=1024)
    return path


def to_onnx(graph: Graph) -> ir.Model:
    """The graph as an onnx_ir model whose slot inputs bear their public names."""
    model = export(graph.exported, TRANSLATIONS)
    settle(model)
    _name_slots(graph, model)
    tidy(model)
    gate_branches(model, graph.slots)
    to_rows(model)
    return model


def tidy(model: ir.Model) -> None:
    """The exporter's own clean-ups, without the one rule that is quadratic in the number of nodes.

    RMS norms become ONNX Runtime's op for them here: its own fusion looks for a quotient, where torch has a product
    with ``rsqrt``.
    """
    rules = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit"]
    passes = ir.passes.Sequential(
        common_passes.InlinePass(),
        FoldConstantsPass(shape_inference=False, input_size_limit=1024, output_size_limit=1024),
        rewriter.RewritePass(rules),
        rewriter.RewritePass(rms_normalization_rules),
        rewriter.RewritePass(rotary_rules),
        common_passes.RemoveUnusedNodesPass(),
        common_passes.RemoveUnusedFunctionsPass(),
        common_passes.RemoveUnusedOpsetsPass(),
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common_passes.LiftSubgraphInitializersToMainGraphPass(),
        common_passes.DeduplicateInitializersPass(),
        common_passes.CommonSubexpressionEliminationPass(),
        common_passes.OutputFixPass(),
        common_passes.NameFixPass(),
    )
    with quiet():
        passes(model)


def bake(model: ir.Model, constants: Mapping[str, torch.Tensor]) -> None:
    """Turn slot inputs into initializers, in place."""
    for value in list(model.graph.inputs):
        tensor = constants.get(value.name or "")
        if tensor is None:
            continue
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(tensor.detach().contiguous().numpy(), name=value.name)
        model.graph.initializers[str(value.name)] = value


def _name_slots(graph: Graph, model: ir.Model) -> None:
    by_node = {slot.node: slot for slot in graph.slots.values()}
    for value in model.graph.inputs:
        slot = by_node.get(value.name or "")
        if slot is not None:
            value.name = slot.name
            value.metadata_props[SITE_METADATA] = slot.site
