"""What a target claims to compute, held against an emitted program before anything is written or built."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir

from lorac.errors import Unavailable
from lorac.ir.engine import Dialect
from lorac.lines import is_elsewhere

_SCOPES, _TRACE = "pkg.torch.onnx.name_scopes", "pkg.torch.onnx.stack_trace"
"""Where torch's exporter notes the module and the lines that a node comes from."""
_FRAME = re.compile(r'File "(.+?)", line (\d+)')


def refuse_unclaimed(model: ir.Model, dialect: Dialect[ir.Model]) -> None:
    """Refuse a program with an op that the target does not claim.

    Raises:
        Unavailable: naming the op, and the module of the host and the line that ask for it.
    """
    if dialect.claims is None:
        return
    for node in model.graph.all_nodes():
        op = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
        if op not in dialect.claims and not _is_function(*op):
            named = "::".join(part for part in op if part)
            raise Unavailable(
                f"{dialect.name} does not compute {named}{origin(node.metadata_props)}",
                next_step="target='eager' runs it; another implementation of that part of the model may be exported",
            )


@functools.cache
def _is_function(domain: str, op: str) -> bool:
    """Whether ONNX itself says an op in terms of others, which a target that lacks it then runs."""
    try:
        schema: Any = onnx.defs.get_schema(op, domain=domain)  # typed without the two that are asked for
    except onnx.defs.SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def origin(metadata: Mapping[str, str]) -> str:
    """Where in the host an op comes from, as far as its metadata tells."""
    scopes = re.findall(r"'([^']*)'", metadata.get(_SCOPES, ""))
    # The last scope is the node itself.
    module = next((scope for scope in reversed(scopes[:-1]) if scope), "")
    frames = [frame for frame in _FRAME.findall(metadata.get(_TRACE, "")) if is_elsewhere(frame[0])]
    line = ", line {1} of {0}".format(*frames[-1]) if frames else ""
    return (f", which '{module}' asks for" if module else "") + line
