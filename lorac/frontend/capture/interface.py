"""The interface of a captured program, derived from the program and from its model's signature."""

from collections.abc import Mapping

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lorac.frontend.capture.call_arguments import CallArguments
from lorac.frontend.host import Host
from lorac.frontend.inputs.dynamic_shapes import find_row_numbers
from lorac.ir.calls.interface import Interface
from lorac.ir.calls.multimodal_positions import POSITION_IDS
from lorac.ir.calls.sizes import SizeConstraints, flatten_argument
from lorac.ir.graph import ops
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.nodes import find_input_examples

aten = torch.ops.aten
_RESHAPING = frozenset(
    {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten._to_copy.default, aten.to.dtype}
    | {aten.clone.default, aten.alias.default, aten.expand.default}
)
"""Ops that do not change the values of ids."""
_EMBEDDINGS = {aten.embedding.default: (1, 0), ops.EMBEDDING: (0, 1)}
"""Op that looks up ids -> the indices of its operands for ids and table."""


def find_input_paths(program: ExportedProgram, host: Host) -> dict[str, str]:
    """Return path of each tensor in a call's arguments -> the program's input for it.

    torch joins the parts of a path with underscores, in lower case, and appends numbers to names that are taken.
    """
    signature = program.graph_signature
    args, kwargs = pytree.tree_unflatten([*signature.user_inputs], program.call_spec.in_spec)
    named = {**dict(zip(host.list_positional_arguments(), args, strict=False)), **kwargs}
    parts = (part for argument, value in named.items() for part in flatten_argument(value, argument))
    return {path: name for path, name in parts if isinstance(name, str)}


def describe_interface(
    graph: Graph, host: Host, arguments: CallArguments, paths: Mapping[str, str], sizes: SizeConstraints
) -> Interface:
    """Return the interface of a captured graph, whose model's output structure is known.

    Args:
        graph: a graph at level host.
        host: the captured model.
        arguments: the example call.
        paths: as ``find_input_paths`` returns them.
        sizes: constraints on the sizes of the inputs.
    """
    program, structure = graph.exported, graph.interface.structure
    assert structure is not None
    inputs = tuple(name for name in program.graph_signature.user_inputs if isinstance(name, str))
    positions = arguments.positions
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.target not in _EMBEDDINGS:
            continue
        ids, table = (node.args[place] for place in _EMBEDDINGS[node.target])
        size = table.meta["val"].shape[0]
        while ids.target in _RESHAPING:
            ids = ids.args[0]
        if ids.op == "placeholder" and ids.name in inputs and isinstance(size, int):
            found[ids.name] = min(size, found.get(ids.name, size))
    return Interface(
        inputs=inputs,
        arguments=host.list_positional_arguments(),
        outputs=structure.tensor_names(inputs),
        structure=structure,
        constants=arguments.fixed,
        defaults=host.defaults(),
        id_counts=found,
        aliases={path: name for path, name in paths.items() if path != name},
        row_numbers=find_row_numbers(host, find_input_examples(program)),
        sizes=sizes,
        derived={} if positions is None else {POSITION_IDS: positions.call},
        positions=positions,
        notes=tuple(arguments.notes),
    )
