"""The self-test without a GPU: the very file that the parser was handed, run by ONNX Runtime on the CPU (invariant 8).

What it says of a file holds for the plan as far as the library computes what ONNX says. Half precision is computed
there by casts. In a dtype that ONNX Runtime's CPU lacks only what can be read off the file is checked, and a note says
so.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnxruntime as ort
import torch

from lorac.backends.onnx.files import MODEL, name_of
from lorac.backends.onnx.selftest import self_test
from lorac.errors import warn
from lorac.ir.engine import Files
from lorac.ir.graph.feeds import fed
from lorac.ir.graph.program import Program
from lorac.ir.host.sites import BaseReader
from lorac.ir.slots.buffers import fused_buffers
from lorac.ir.slots.site import SitePlan
from lorac.ir.slots.snapshot import Snapshot

Tensor = torch.Tensor
_LACKING = onnx.TensorProto.BFLOAT16
UNCHECKED = "what was emitted was not run against the model: ONNX Runtime's CPU does not compute in bfloat16"


class OnCpu:
    """The emitted files of a program as ONNX Runtime runs them, in memory of their own.

    Args:
        program: what was emitted.
        plans: slots of every site.
        base: reads base weights.
        mode: as the engine's.
        files: the program, held, where it was written.
    """

    def __init__(
        self, program: Program, plans: Mapping[str, SitePlan], base: BaseReader, mode: str, files: Files
    ) -> None:
        self.mode, self.files, self.base = mode, files, base
        self.slots = {name: slot for graph in program.graphs.values() for name, slot in graph.slots.items()}
        self.plans = fed(self.slots, plans)
        self.buffers, self.memory = fused_buffers(self.plans, base) if self.fused else ({}, {})
        self._sessions: dict[str, ort.InferenceSession] = {}

    @property
    def fused(self) -> bool:
        """Whether weights are written in place."""
        return self.mode == "fused"

    def write(self, snapshot: Snapshot) -> int:
        """Make the weights hold a snapshot."""
        composed = snapshot.composed
        return sum(
            buffer.write(composed[path].change if path in composed else None) for path, buffer in self.buffers.items()
        )

    def outputs(self, graph: str, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """A graph's outputs for tensors in its slots and inputs by name."""
        given = {name: tensor.detach().numpy() for name, tensor in {**inputs, **tensors}.items()}
        return [torch.from_numpy(value) for value in self._session(graph).run(None, given)]

    def _session(self, graph: str) -> ort.InferenceSession:
        if graph not in self._sessions:
            settings = ort.SessionOptions()
            settings.intra_op_num_threads = 1
            settings.log_severity_level = 3
            path = str(self.files[name_of(graph, MODEL)].where)
            self._sessions[graph] = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        return self._sessions[graph]


def check(tried: OnCpu, program: Program, snapshot: Snapshot) -> tuple[str, ...]:
    """Hold emitted files against the program that they were emitted from.

    Args:
        tried: the files.
        program: the lowered program, with its weights.
        snapshot: what the slots hold at first; what a baked program holds.

    Returns:
        Notes of what could not be checked.

    Raises:
        SelfTestFailed: naming the slots.
    """
    runs = not any(_is_lacking(tried.files, name) for name in program.graphs)
    self_test(tried, program, snapshot, runs=runs)
    if runs:
        return ()
    warn(UNCHECKED, next_step="dtype='float32' and dtype='float16' are checked")
    return (UNCHECKED,)


def _is_lacking(files: Files, graph: str) -> bool:
    """Whether a model has a value of the dtype that ONNX Runtime's CPU lacks."""
    model = onnx.load_from_string(files[name_of(graph, MODEL)].read())
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    kinds = {value.type.tensor_type.elem_type for value in values} | {t.data_type for t in model.graph.initializer}
    return _LACKING in kinds
