"""The order of the passes that turn a trace into a graph at level host, as data.

``lorac.passes.pipelines`` has the order of the passes that lower the graph.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import fx
from torch.export.graph_signature import InputKind

from lorac.errors import CaptureError
from lorac.frontend.capture.encoder_decoder import CheckAttention
from lorac.frontend.capture.higher_order_ops import InlineHigherOrderOps
from lorac.frontend.capture.position_ids import MakePositionsPerRow
from lorac.frontend.capture.repeated_layers import ExpandRepeatedLayers
from lorac.frontend.capture.written_attention import FoldWrittenAttention
from lorac.ir.graph.edit import keep_tensor_outputs, qualify_names
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.passes import Pass, PassResult, TracePass


def capture_passes(
    prefix: str = "", branches: tuple[str, ...] = (), *, attention: bool = False, model: str = ""
) -> tuple[Pass, ...]:
    """Return the passes that turn a trace into a graph at level host.

    Args:
        prefix: prefix of the paths of modules and tensors, if the model is one of several components.
        branches: lines of the model whose branches the trace took from the example.
        attention: whether each attention becomes an op, so that a sequence can grow in a cache.
        model: class name of the model.
    """
    cache = (FoldWrittenAttention(), CheckAttention(model), MakePositionsPerRow()) if attention else ()
    return (
        InlineHigherOrderOps(),
        ExpandRepeatedLayers(prefix),
        CheckTrace(branches),
        *cache,
        KeepTensorOutputs(),
        QualifyNames(prefix),
    )


@final
@dataclass(frozen=True)
class CheckTrace(TracePass):
    """Refuse traces whose programs would be wrong.

    Attributes:
        branches: lines of the model whose branches the trace took from the example.
    """

    name: ClassVar[str] = "check_trace"
    branches: tuple[str, ...] = ()

    def apply(self, graph: Graph) -> PassResult:
        """Check the graph.

        Raises:
            CaptureError: a branch depends on the output of a site, which adapters change; or forward uses an object
                other than a tensor, such as a generator.
        """
        reads: set[fx.Node] = set()
        for node in graph.fx.nodes if self.branches else ():
            is_site = getattr(node.target, "namespace", "") == "lorac"
            if is_site or not reads.isdisjoint(node.all_input_nodes):
                reads.add(node)
        if any("_assert_" in str(node.target) and "metadata" not in str(node.target) for node in reads):
            raise CaptureError(
                f"forward branches on outputs of layers (at {', at '.join(self.branches)}), and adapters change these "
                "outputs",
                next_step="make forward branch on its inputs alone; target='eager' runs the model itself",
            )
        for spec in graph.exported.graph_signature.input_specs:
            if spec.kind is InputKind.CUSTOM_OBJ:
                value = graph.exported.constants[str(spec.target)]
                raise CaptureError(
                    f"forward uses a {type(value).__name__} of the model, which a program cannot hold",
                    next_step="target='eager' runs the model itself",
                )
        return PassResult(changed=False)


@final
@dataclass(frozen=True)
class KeepTensorOutputs(TracePass):
    """Make tensors the only outputs, and record the structure that rebuilds the model's output."""

    name: ClassVar[str] = "outputs"

    def apply(self, graph: Graph) -> PassResult:
        if graph.interface.structure is not None:
            return PassResult(changed=False)
        structure = keep_tensor_outputs(graph.exported)
        graph.interface = replace(graph.interface, structure=structure)
        return PassResult(bool(structure.constants or structure.numbers))


@final
@dataclass(frozen=True)
class QualifyNames(Pass):
    """traced -> host. Modules and tensors of a component get the component's name as a prefix.

    Attributes:
        prefix: the component's name and a dot; empty for a model without components.
    """

    name: ClassVar[str] = "names"
    reads: ClassVar[Level] = Level.TRACED
    leaves: ClassVar[Level] = Level.HOST
    prefix: str = ""

    def apply(self, graph: Graph) -> PassResult:
        qualify_names(graph.exported, self.prefix)
        return PassResult(bool(self.prefix))
