"""Building the engine: capture, passes, emission, session, self-test."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lorac.backends.onnxruntime.emit import emit
from lorac.backends.onnxruntime.engine import OrtEngine, named_tensors
from lorac.backends.onnxruntime.signature import CallSignature
from lorac.ir.capture import export
from lorac.ir.copying import structural_copy
from lorac.ir.engine import BuildRequest
from lorac.ir.graph import Graph
from lorac.ir.sites import Site
from lorac.ir.slots import SitePlan
from lorac.ir.snapshot import BaseReader, slots_of
from lorac.ir.types import SiteKind

_BASE = "base.safetensors"


def build(request: BuildRequest) -> OrtEngine:
    """An engine for the request; the host is not kept."""
    folder = Path(tempfile.mkdtemp(prefix="lorac-"))
    try:
        engine = _build(request, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(engine, shutil.rmtree, folder, ignore_errors=True)
    return engine


def _build(request: BuildRequest, folder: Path) -> OrtEngine:
    host = request.model
    blocks = [path for path, plan in request.plans.items() if plan.site.kind is SiteKind.BLOCK]
    exported = export(host, request.example_inputs, request.dynamic_shapes, blocks=blocks)
    graph = Graph("main", exported, request.sites, request.plans)
    request.lower(graph, request.options.aux)
    signature = call_signature(graph, host)
    constants = None
    if request.mode == "baked":
        constants = named_tensors(
            graph.slots, request.plans, slots_of(request.plans, request.snapshot, request.base)
        )
    path = emit(graph, folder, constants)
    write_base(request, folder / _BASE)
    base = file_base(folder / _BASE, request.plans)
    engine = OrtEngine(
        session=session(path, request.options),
        signature=signature,
        slots=graph.slots,
        plans=request.plans,
        base=base,
        mode=request.mode,
        folder=folder,
    )
    return engine


def host_for(model: nn.Module) -> nn.Module:
    """The host itself, or a float32 copy of one in half precision (ONNX Runtime's CPU kernels are float32)."""
    half = {torch.float16, torch.bfloat16}
    if not any(p.dtype in half for p in (*model.parameters(), *model.buffers())):
        return model
    return structural_copy(model).float()


def session(path: Path, options: Any) -> ort.InferenceSession:
    """A session over an emitted model."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    settings.log_severity_level = 3
    return ort.InferenceSession(str(path), settings, providers=list(options.providers))


def call_signature(graph: Graph, host: nn.Module) -> CallSignature:
    """How the host is called, read off the captured program."""
    exported = graph.exported
    slots = {slot.node for slot in graph.slots.values()}
    inputs = tuple(name for name in exported.graph_signature.user_inputs if name not in slots)
    signature = exported.module_call_graph[0].signature
    assert signature is not None
    spec = signature.out_spec
    if graph.extra_outputs:
        spec = spec.children()[0] if hasattr(spec, "children") and callable(spec.children) else spec.children_specs[0]
    arguments = tuple(signature.forward_arg_names or inputs)
    return CallSignature(
        inputs=tuple(str(name) for name in inputs),
        arguments=arguments,
        outputs=tuple(str(name) for name in exported.graph_signature.user_outputs),
        out_spec=spec,
        extra=tuple(graph.extra_outputs),
    )


def write_base(request: BuildRequest, path: Path) -> None:
    """Keep the base weights of every planned site, for adapters added and weights restored later."""
    tensors: dict[str, torch.Tensor] = {}
    for plan in request.plans.values():
        site = plan.site
        for name in (site.weight, site.bias):
            if name is not None:
                tensors[name] = request.model.get_parameter(name).detach().contiguous()
    save_file({name: tensor.clone() if _shared(name, tensor, tensors) else tensor for name, tensor in tensors.items()}, path)


def file_base(path: Path, plans: Mapping[str, SitePlan]) -> BaseReader:
    """A reader of base weights in a file, mapped, not loaded."""
    opened = safe_open(path, framework="pt")

    def weight(site: Site) -> torch.Tensor:
        assert site.weight is not None
        return site.present(opened.get_tensor(site.weight))

    def bias(site: Site) -> torch.Tensor | None:
        return opened.get_tensor(site.bias) if site.bias else None

    return BaseReader(weight, bias)


def _shared(name: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> bool:
    return any(other is not tensor and other.data_ptr() == tensor.data_ptr() for n, other in tensors.items() if n != name)
