"""The cost of exporting a model without lorac, against which compiling it is measured."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from lorac.frontend.host import Host
from lorac.frontend.hosts.transformers import TransformersHost
from lorac.frontend.inputs.dynamic_shapes import make_dynamic_shapes
from lorac.third_party_output import suppress_third_party_output

Shapes = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def plain_export(model: nn.Module, call: Mapping[str, Any], shapes: Shapes | None) -> None:
    """From a model to a session of ONNX Runtime, by transformers' exporter or torch's, with the sizes that lorac frees.

    As lorac does, sizes are named first, and left to torch where that fails.
    """
    host = Host.of(model)
    named = (
        [make_dynamic_shapes(host, call, named=name) for name in (True, False)] if shapes is None else [shapes(call)]
    )
    export = _of_transformers if isinstance(host, TransformersHost) else _of_torch
    with suppress_third_party_output(), torch.no_grad():
        try:
            _into_session(export(model, dict(call), named[0]))
        except Exception:
            if len(named) == 1:
                raise
            _into_session(export(model, dict(call), named[1]))


def _into_session(program: Any) -> None:
    import onnx_ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plain.onnx")
        onnx_ir.save(program, path, external_data=f"{path.name}.data")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _of_torch(model: nn.Module, call: dict[str, Any], shapes: Any) -> Any:
    made = torch.onnx.export(model, (), kwargs=call, dynamic_shapes=dict(shapes), dynamo=True, verbose=False)
    assert made is not None
    return made.model


def _of_transformers(model: nn.Module, call: dict[str, Any], shapes: Any) -> Any:
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    # torch prints its steps unless it is told not to, and transformers has no way to tell it.
    silent = functools.partial(torch.onnx.export, verbose=False)
    with mock.patch.object(torch.onnx, "export", silent):
        # It changes the model it is given.
        return OnnxExporter().export(copy.deepcopy(model), call, OnnxConfig(dynamic_shapes=dict(shapes))).program
