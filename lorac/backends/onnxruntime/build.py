"""Building the engine: capture, passes, emission, session, self-test."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

import torch
from torch import nn

from lorac.backends.onnxruntime.emit import emit
from lorac.backends.onnxruntime.engine import OrtEngine
from lorac.backends.onnxruntime.selftest import self_test
from lorac.backends.onnxruntime.session import new_session
from lorac.ir.engine import BuildRequest
from lorac.ir.graph.feeds import named_tensors
from lorac.ir.host.copying import structural_copy
from lorac.ir.lowered import lowered
from lorac.ir.slots.emits import refuse_unemitted
from lorac.ir.slots.snapshot import slots_of
from lorac.ir.store.tensors import TensorFile, base_tensors, by_columns, file_base
from lorac.progress import Progress, progress

BASE = "base.safetensors"


def build(request: BuildRequest) -> OrtEngine:
    """An engine for the request; the host is not kept."""
    folder = Path(tempfile.mkdtemp(prefix="lorac-"))
    try:
        with progress("compiling for ONNX Runtime", total=4) as report:
            engine = _build(request, folder, report)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(engine, shutil.rmtree, folder, ignore_errors=True)
    return engine


def _build(request: BuildRequest, folder: Path, report: Progress) -> OrtEngine:
    refuse_unemitted(request.options.aux, request.plans.values())
    report.step("capture and passes")
    graph, signature = lowered(request, request.options.aux)
    constants = None
    if request.mode == "baked":
        constants = named_tensors(graph.slots, request.plans, slots_of(request.plans, request.snapshot, request.base))
    report.step("emission")
    path = emit(graph, folder, constants)
    report.step("session")
    plans = request.plans
    tensors = base_tensors(request.model, {path: plan.site for path, plan in plans.items()})
    TensorFile.write(folder / BASE, tensors, by_columns(plans.values()))
    engine = OrtEngine(
        session=new_session(path, request.options),
        signature=signature,
        slots=graph.slots,
        plans=request.plans,
        base=file_base(TensorFile(folder / BASE)),
        mode=request.mode,
        folder=folder,
        options=request.options,
    )
    if request.options.self_test:
        report.step("self-test")
        self_test(engine, graph, request.snapshot)
    return engine


def host_for(model: nn.Module) -> nn.Module:
    """The host itself, or a float32 copy of one in half precision (ONNX Runtime's CPU kernels are float32)."""
    half = {torch.float16, torch.bfloat16}
    if not any(p.dtype in half for p in (*model.parameters(), *model.buffers())):
        return model
    return structural_copy(model).float()
