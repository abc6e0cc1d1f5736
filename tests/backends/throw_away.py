"""A backend that lorac does not have: plain ONNX in a taste of its own, run by ONNX Runtime one call at a time.

It takes no op of ONNX Runtime's own, puts branches behind ``Where``, packs nothing, keeps one component in a pair that
is off, and gives convolutions a fixed rank: what a target without dynamic control flow asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch

from lorac.backends.onnx.emit import emit
from lorac.backends.onnx.legalize import Legalize
from lorac.errors import Unavailable
from lorac.ir.graph.feeds import collect_slot_tensors, select_reached_plans
from lorac.ir.sites import SiteKind
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.plans import RankPolicy, SitePlan, SiteSlots
from lorac.target.backend import Backend, BuildRequest, StoredState, TargetOptions
from lorac.target.dialect import AnyDialect, BranchGate, Dialect
from lorac.target.engine import BoundProgram, CallResult, Engine, ProgramFiles

DIALECT: Dialect[ir.Model] = Dialect(
    name="plain",
    claims=frozenset(("", schema.name) for schema in onnx.defs.get_all_schemas() if not schema.domain),
    passes=(Legalize(),),
    gates=BranchGate.WHERE,
    ranks={SiteKind.LINEAR: RankPolicy.FROM_ONE, SiteKind.CONV2D: RankPolicy.FIXED},
    fuses_projections=False,
)


@dataclass(frozen=True, kw_only=True)
class Options(TargetOptions):
    """Options of the plain target.

    Attributes:
        threads: threads of one operator.
    """

    threads: int = 1

    def check(self) -> None:
        """Any number will do."""


Tensors = Mapping[str, torch.Tensor]


class PlainEngine(Engine):
    """Runs one emitted model."""

    target = "plain"

    def __init__(self, request: BuildRequest[Options], dialect: Dialect[ir.Model]) -> None:
        assert request.program is not None
        (self.graph,) = request.program.graphs.values()
        self.model = emit(self.graph, dialect)
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = request.options.threads
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = ort.InferenceSession(ir.to_proto(self.model).SerializeToString(), settings)
        self.plans, self.mode, self.buffers = select_reached_plans(self.graph.slots, request.plans), request.mode, {}

    def bind(self, snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> BoundProgram[Tensors]:
        return BoundProgram(self, collect_slot_tensors(self.graph.slots, self.plans, slots))

    @property
    def written_program(self) -> BoundProgram[Tensors]:
        raise Unavailable("the plain target writes no weights")

    def record_written(self, snapshot: ComposedWeights) -> None:
        raise Unavailable("the plain target writes no weights")

    def activate(self, content: Tensors) -> None:
        """Nothing: every call names its tensors."""

    def call(self, content: Tensors, graph: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CallResult:
        given = {**self.graph.interface.check(args, kwargs), **content}
        arrays = {name: value.detach().contiguous().numpy() for name, value in given.items()}
        values = [torch.from_numpy(array) for array in self.session.run(None, arrays)]
        return CallResult(self.graph.interface.build_output(values, kwargs)[0])


class Plain(Backend[Options]):
    """Builds such engines; stores nothing."""

    dialect: AnyDialect
    options = Options

    def __init__(self, dialect: Dialect[ir.Model] = DIALECT) -> None:
        self.dialect = self.taste = dialect

    def build(self, request: BuildRequest[Options]) -> PlainEngine:
        return PlainEngine(request, self.taste)

    def store(self, engine: Engine, folder: Path, request: BuildRequest[Options] | None) -> StoredState:
        raise Unavailable("the plain target stores nothing")

    def restore(
        self, stored: StoredState, files: ProgramFiles, plans: Mapping[str, SitePlan], mode: str, device: Any
    ) -> Engine:
        raise Unavailable("the plain target stores nothing")

    def read_base_weights(self, files: ProgramFiles) -> None:
        raise Unavailable("the plain target stores nothing")


BACKEND = Plain()
NARROW = Plain(dataclasses.replace(DIALECT, claims=(DIALECT.claims or frozenset()) - {("", "Tanh")}))
"""The same for a target that lacks an op."""
