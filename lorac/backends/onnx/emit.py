"""From a lowered graph to an ONNX model in a dialect: one emitter for all targets that read ONNX.

Slots remain inputs. Inputs, outputs and axes have the model's names.
"""

import functools
from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.optimizer._constant_folding import FoldConstantsPass, Replacement

from lorac.backends.onnx.claims import check_claims, list_unclaimed_ops
from lorac.backends.onnx.cleanup_rules import default_rules, exact_no_op_rules
from lorac.backends.onnx.export.exporter import export
from lorac.backends.onnx.export.translations import TRANSLATIONS, drop_split_counts
from lorac.backends.onnx.gates import GATES
from lorac.backends.onnx.initializers import ConcatenatedTensor, concatenate_weights
from lorac.backends.onnx.model_files import MAX_LENGTH_KEY
from lorac.backends.onnx.passes import OnnxDialect, PassObserver, make_rewrite_pass, run_passes
from lorac.errors import Unavailable
from lorac.ir.graph.graph import Graph, Program
from lorac.ir.graph.symbolic_shapes import rename_symbols
from lorac.ir.traces.gate import tracing
from lorac.third_party_output import suppress_third_party_output

SITE_METADATA = "lorac.site"
"""Key of the metadata of a slot input: the path of its site, or those of a fused projection with commas."""


def emit(graph: Graph, dialect: OnnxDialect, observe: PassObserver | None = None) -> ir.Model:
    """Return a graph as a model whose slot inputs have their public names.

    Args:
        graph: at level target.
        dialect: the target's ops and rewrites.
        observe: called with the name and the result of each of the dialect's passes.

    Raises:
        Unavailable: an op has no translation, or the target does not claim it; the error names the module that calls
            it.
    """
    model = _build_model(graph, dialect, observe)
    check_claims(model, dialect)
    return model


def list_unsupported_ops(program: Program, dialect: OnnxDialect) -> tuple[str, ...]:
    """List the ops of a program that the target does not compute, each with the module and line that calls it."""
    found: list[str] = []
    for graph in program.graphs.values():
        try:
            found += list_unclaimed_ops(_build_model(graph, dialect), dialect)
        except Unavailable as error:  # the first op without a translation ends the emission
            found.append(error.what)
    return tuple(dict.fromkeys(found))


@tracing()  # passes of onnx_ir are global objects
def _build_model(graph: Graph, dialect: OnnxDialect, observe: PassObserver | None = None) -> ir.Model:
    """Return the model, without a check that the target claims its ops."""
    model = export(graph.exported, TRANSLATIONS)
    drop_split_counts(model)
    by_node = {slot.node: slot for slot in graph.slots.values()}
    caches = {node: name for name, node in graph.cache_inputs.items()}
    for value in model.graph.inputs:
        slot = by_node.get(value.name or "")
        if slot is not None:
            value.name = slot.name
            value.metadata_props[SITE_METADATA] = ", ".join(slot.members or (slot.site,))
        value.name = caches.get(value.name or "", value.name)
    _name_outputs(model, graph.interface.outputs)
    with suppress_third_party_output():
        common_passes.InlinePass()(model)
        concatenate_weights(model)
        _FoldConstants(shape_inference=False, input_size_limit=1024, output_size_limit=1024)(model)
        make_rewrite_pass([*default_rules(), *exact_no_op_rules()])(model)
        run_passes(model, dialect.early_rewrites, observe)
        _CLEAN_UP(model)
    GATES[dialect.gates](model, graph.slots)
    run_passes(model, dialect.late_rewrites, observe)
    _name_outputs(model, graph.interface.outputs)  # again, since rewrites make new values
    _name_sizes(model, graph)
    if graph.cache_inputs and graph.longest is not None:
        model.metadata_props[MAX_LENGTH_KEY] = str(graph.longest)
    return model


class _FoldConstants(FoldConstantsPass):
    """onnxscript's pass, except that a transposed concatenation of weights stays lazy until it is written."""

    def process_node(self, node: ir.Node, is_function: bool) -> Replacement | None:
        """Fold a node as onnxscript does, but transpose lazily a concatenation that nothing else reads."""
        transposes = node.op_type == "Transpose" and node.attributes.get_ints("perm") == (1, 0) and not is_function
        read = node.inputs[0] if transposes else None
        tensor = read.const_value if read is not None and len(read.uses()) == 1 else None
        if not isinstance(tensor, ConcatenatedTensor) or node.graph is None:
            return super().process_node(node, is_function)
        turned = tensor.transposed
        value = ir.val(node.outputs[0].name, const_value=turned, shape=turned.shape, dtype=turned.dtype)
        node.graph.register_initializer(value)
        return Replacement([value], [])


_CLEAN_UP = ir.passes.Sequential(
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


def _name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Give outputs the model's names; rename other values with these names."""
    inputs = {value: value.name for value in model.graph.inputs}
    # The pass gives an output that is also an input or another output a new value, and renames the other.
    common_passes.OutputFixPass()(model)
    wanted = dict(zip(model.graph.outputs, names, strict=True))
    taken = set(wanted.values())
    computed = (value for node in model.graph.all_nodes() for value in node.outputs)
    values = (*computed, *model.graph.initializers.values())
    for value in [value for value in values if value.name in taken and value not in wanted]:
        value.name = f"{value.name}_value"
    for value, name in {**wanted, **inputs}.items():
        value.name = name


def _name_sizes(model: ir.Model, graph: Graph) -> None:
    """Replace torch's symbols of dynamic sizes by the model's names."""

    @functools.cache
    def rename(symbol: str) -> int | str:
        text = rename_symbols(symbol, graph.axes)
        return int(text) if text.isdecimal() else text  # a dynamic size that the trace fixed is a symbol called "2"

    computed = [value for node in model.graph.all_nodes() for value in node.outputs]
    for value in (*model.graph.inputs, *computed):
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            value.shape = ir.Shape([rename(dim) if isinstance(dim, str) else dim for dim in dims])
