"""The interface of a captured program, read from the program and from the signature of its model."""

from collections.abc import Collection

import torch
from torch.export import ExportedProgram

from lorac.frontend.capture.call_arguments import CallArguments
from lorac.frontend.host import Host
from lorac.frontend.inputs.dynamic_shapes import find_row_numbers
from lorac.ir.calls.interface import Interface, program_input_name
from lorac.ir.calls.multimodal_positions import POSITION_IDS
from lorac.ir.calls.sizes import SizeConstraints
from lorac.ir.graph import ops
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.nodes import find_input_examples

aten = torch.ops.aten
_RESHAPING = frozenset(
    {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten._to_copy.default, aten.to.dtype}
    | {aten.clone.default, aten.alias.default, aten.expand.default}
)
"""Ops that leave the values of ids unchanged."""
_EMBEDDINGS = {aten.embedding.default: (1, 0), ops.EMBEDDING: (0, 1)}
"""Op that looks ids up -> which operands are the ids and the table."""


def describe_interface(graph: Graph, host: Host, arguments: CallArguments, sizes: SizeConstraints) -> Interface:
    """Return the interface of a captured graph, which knows the structure of the model's output.

    Args:
        graph: at level host.
        host: the model that it was captured from.
        arguments: the example call.
        sizes: which sizes the inputs may have.
    """
    program, structure = graph.exported, graph.interface.structure
    assert structure is not None
    inputs = tuple(map(str, program.graph_signature.user_inputs))
    positions = arguments.positions
    named = ((name, program_input_name(name)) for name in host.parameters)
    return Interface(
        inputs=inputs,
        arguments=host.list_positional_arguments(inputs),
        outputs=structure.tensor_names(inputs),
        structure=structure,
        constants=arguments.fixed,
        defaults=host.defaults(),
        id_counts=_count_ids(program, inputs),
        aliases={name: known for name, known in named if known in inputs and known not in host.parameters},
        row_numbers=find_row_numbers(host, find_input_examples(program)),
        sizes=sizes,
        derived={} if positions is None else {POSITION_IDS: positions.call},
        positions=positions,
        notes=tuple(arguments.notes),
    )


def _count_ids(program: ExportedProgram, inputs: Collection[str]) -> dict[str, int]:
    """Return the inputs that embeddings read as ids, with the number of rows of the smallest embedding of each."""
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
    return found
