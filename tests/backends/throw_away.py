"""A backend that lorac does not have: plain ONNX in a dialect of its own, run by ONNX Runtime one call at a time.

It takes no op of ONNX Runtime's own, puts branches behind ``Where``, packs nothing, keeps one component in a pair that
is off, and gives convolutions a fixed rank: what a target without dynamic control flow asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import onnxruntime as ort
import torch

from lorac import SiteKind
from lorac.backends.onnx.base_backend import OnnxBackend
from lorac.backends.onnx.engine import OnnxEngine, OnnxProgram
from lorac.backends.onnx.legalize import Legalize
from lorac.backends.onnx.model_files import read_model_files
from lorac.backends.onnx.passes import OnnxDialect
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.graph import SlotInput
from lorac.ir.slots.plans import RankPolicy
from lorac.target.backend import TargetOptions
from lorac.target.dialect import BranchGate, Dialect
from lorac.target.engine import ProgramFiles

DIALECT: OnnxDialect = Dialect(
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
        """Do nothing: any number will do."""


@dataclass(frozen=True, eq=False)
class PlainGraph:
    """One graph: its session, and what it takes and gives."""

    session: ort.InferenceSession
    interface: Interface
    slots: Mapping[str, SlotInput]

    @property
    def dtypes(self) -> Mapping[str, torch.dtype | None]:
        return dict.fromkeys(self.interface.inputs)


class PlainEngine(OnnxEngine[PlainGraph, Options]):
    """Runs emitted models."""

    target = "plain"

    def bind_tensors(self, tensors: Mapping[str, torch.Tensor]) -> PlainProgram:
        return PlainProgram(self, tensors)


class PlainProgram(OnnxProgram):
    """The models with the tensors of a choice of adapters."""

    def run_graph(self, graph: str, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        given = {**inputs, **self.tensors}
        arrays = {name: value.detach().contiguous().numpy() for name, value in given.items()}
        return [torch.from_numpy(array) for array in self.engine.graphs[graph].session.run(None, arrays)]


class Plain(OnnxBackend[Options, PlainGraph]):
    """Builds such engines."""

    options = Options
    engine = PlainEngine

    def __init__(self, dialect: OnnxDialect = DIALECT) -> None:
        self.own_dialect = dialect

    def dialect_for(self, options: Options) -> OnnxDialect:
        return self.own_dialect

    def load_graph(
        self,
        name: str,
        files: ProgramFiles,
        interface: Interface,
        slots: Mapping[str, SlotInput],
        stored: Mapping[str, Any],
        options: Options,
    ) -> PlainGraph:
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = options.threads
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        model, weights = read_model_files(files, name)
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        settings.add_external_initializers(list(weights), values)
        session = ort.InferenceSession(model.SerializeToString(), settings)
        session.weights = weights
        return PlainGraph(session, interface, slots)


BACKEND = Plain()
NARROW = Plain(dataclasses.replace(DIALECT, claims=(DIALECT.claims or frozenset()) - {("", "Tanh")}))
"""The same for a target that lacks an op."""
