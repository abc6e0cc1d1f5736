"""Tracing through transformers' exporter, which patches code of its models that does not trace."""

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from lorac.frontend.hugging_face import TRACE_CONFIG, set_config_fields
from lorac.frontend.inputs.call_binding import Inputs


def trace_hugging_face(host: nn.Module, inputs: Inputs, shapes: dict[str, Any] | None) -> ExportedProgram:
    """Trace through transformers' exporter, without caches. It changes its arguments: the copy, not the host."""
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import DynamoExporter

    # Without tested_versions it warns at every export that torch is newer than the tested one.
    exporter: Any = type("Exporter", (DynamoExporter,), {"tested_versions": {}})()
    set_config_fields(host, TRACE_CONFIG)
    program: ExportedProgram
    with _patch_imported_models_only():
        program, _ = exporter.export_program(host, dict(inputs), DynamoConfig(dynamic_shapes=shapes))
    return program


@contextlib.contextmanager
def _patch_imported_models_only() -> Iterator[None]:
    """Make transformers' exporter patch imported models only, in this context.

    It imports every model that it has a patch for, which takes most of a second. Unnecessary once it looks these models
    up among those that are imported.
    """
    from transformers.exporters import utils

    import_anything = utils.import_dotted_path

    def import_if_loaded(path: str, missing_ok: bool = False) -> object:
        module = ".".join(path.split(".")[: len(_A_MODELS_MODULE)])
        absent = _own_trace.get() and path.startswith(_MODELS) and module not in sys.modules
        return None if absent and missing_ok else import_anything(path, missing_ok)

    utils.import_dotted_path = import_if_loaded
    token = _own_trace.set(True)
    try:
        yield
    finally:
        _own_trace.reset(token)
        utils.import_dotted_path = import_anything


_own_trace: ContextVar[bool] = ContextVar("own_trace", default=False)
_A_MODELS_MODULE = ("transformers", "models", "model", "module")
_MODELS = ".".join(_A_MODELS_MODULE[:2]) + "."
