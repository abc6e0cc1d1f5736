"""A check of an emitted program's ops against the ops that its target claims, before anything is written or built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx

from lorac.source_lines import format_location, is_user_code
from lorac.target.dialect import AnyDialect, refuse_unclaimed

if TYPE_CHECKING:  # errors of loading name modules and lines by this file, and loading needs no onnx_ir
    import onnx_ir as ir

_SCOPES, _STACK_TRACE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"
"""Keys under which torch's exporter notes the modules and the source lines of a node."""
_CLASS_HIERARCHY = "pkg.torch.onnx.class_hierarchy"
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""The module that torch notes for a node that belongs to none."""
_FRAME = re.compile(r'File "(.+?)", line (\d+)')


def check_claims(model: ir.Model, dialect: AnyDialect) -> None:
    """Refuse a program with an op that the target does not claim.

    Raises:
        Unavailable: naming every such op, with the module and the model's line that calls it.
    """
    refuse_unclaimed(dialect, list_unclaimed_ops(model, dialect))


def list_unclaimed_ops(model: ir.Model, dialect: AnyDialect) -> list[str]:
    """Return the ops of a program that the target does not claim, each once, with the module and line that calls it."""
    claims = dialect.claims
    if claims is None:
        return []
    found: dict[str, None] = {}
    for node in model.graph.all_nodes():
        domain, op = op_key(node)
        if (domain, op) in claims:
            continue
        # ONNX defines some ops as functions of others, which a target can run instead.
        if dialect.functions and onnx.defs.has(op, domain):
            schema: Any = onnx.defs.get_schema(op, domain=domain)  # typed without its functions
            if schema.has_function or schema.has_context_dependent_function:
                continue
        found["::".join(filter(None, (domain, op))) + describe_origin(node.metadata_props)] = None
    return list(found)


def op_key(node: ir.Node) -> tuple[str, str]:
    """Return a node's domain, empty for ONNX's own, and its op type."""
    return ("" if node.domain == "ai.onnx" else node.domain, node.op_type)


def read_metadata(node: onnx.NodeProto) -> dict[str, str]:
    """Return the metadata of a node in a file."""
    return {entry.key: entry.value for entry in node.metadata_props}


def describe_origin(metadata: Mapping[str, str]) -> str:
    """Describe the module and the model's line that call an op, if its metadata contains them."""
    modules, line = modules_of(metadata) or (), _line(metadata)
    named = f", which '{modules[-1]}' asks for" if modules else ""
    return named + (", line {1} of {0}".format(*line) if line else "")


def modules_of(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the modules around a node, outermost first; None if its metadata has none."""
    scopes = re.findall(r"'([^']*)'", metadata.get(_SCOPES, ""))
    # The last scope is the node itself.
    return tuple(scope for scope in scopes[:-1] if scope and scope != _NO_MODULE) if scopes else None


def classes_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return path -> class name of the modules around a node, including the model itself."""
    scopes, kinds = (re.findall(r"'([^']*)'", metadata.get(key, "")) for key in (_SCOPES, _CLASS_HIERARCHY))
    # The last of both is the node itself.
    return {path: kind.rpartition(".")[2] for path, kind in zip(scopes[:-1], kinds[:-1], strict=False)}


def source_of(metadata: Mapping[str, str]) -> str:
    """Return ``file:line`` of the model's line that calls a node; empty if its metadata has no line."""
    line = _line(metadata)
    return format_location(*line) if line else ""


def _line(metadata: Mapping[str, str]) -> tuple[str, str] | None:
    frames: list[tuple[str, str]] = _FRAME.findall(metadata.get(_STACK_TRACE, ""))
    found = [frame for frame in frames if is_user_code(frame[0])]
    return found[-1] if found else None
