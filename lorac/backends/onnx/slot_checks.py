"""Static checks of an emitted model: every slot is an input, and no constant equals a slot's content."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from lorac.backends.onnx.engine import AnyOnnxEngine
from lorac.backends.onnx.model_files import MODEL_FILE, graph_file
from lorac.backends.onnx.passes import nested_nodes
from lorac.backends.onnx.tested_contents import holds_same_values, self_test_failure
from lorac.ir.graph.graph import Graph


def check_slots(engine: AnyOnnxEngine, graph: Graph, contents: Mapping[str, Tensor]) -> None:
    """Check the emitted model of a graph.

    Args:
        contents: the contents of slots that no constant may equal.
    """
    model = ir.load(engine.files[graph_file(graph.name, MODEL_FILE)].where)
    check_slot_inputs(model, [] if engine.constant else list(graph.slots), list(graph.slots))
    check_slot_constants(model, contents)


def check_slot_inputs(model: ir.Model, slots: Collection[str], known: Collection[str]) -> None:
    """Check that every slot is an input and reaches an output, and that no other known slot is an input."""
    inputs = {str(value.name): value for value in model.graph.inputs}
    folded = [s for s in slots if s not in inputs]
    if folded:
        raise self_test_failure(folded, "became constants")
    stray = [s for s in known if s not in slots and s in inputs]
    if stray:
        raise self_test_failure(stray, "are still inputs of a baked program")
    live: set[int] = set()
    todo: list[ir.Value | None] = [*model.graph.outputs]
    while todo:
        value = todo.pop()
        if value is None or id(value) in live:
            continue
        live.add(id(value))
        producer = value.producer()
        for node in () if producer is None else (producer, *nested_nodes(producer)):
            todo.extend(node.inputs)
    dead = [s for s in slots if id(inputs[s]) not in live]
    if dead:
        raise self_test_failure(dead, "reach no output")


def check_slot_constants(model: ir.Model, contents: Mapping[str, Tensor]) -> None:
    """Check that no constant of the model equals a slot's content, or its transpose."""
    by_size: dict[int, list[tuple[str, Tensor]]] = defaultdict(list)
    for name, tensor in contents.items():
        by_size[tensor.numel()].append((name, tensor))
    for constant in _constants(model):
        candidates = by_size.get(int(constant.size), [])
        if not candidates or constant.dtype not in _FLOATING:
            continue
        array = constant.numpy()  # NumPy lacks bfloat16
        value = torch.from_numpy(
            array.astype("f4") if constant.dtype == ir.DataType.BFLOAT16 else array.copy()
        ).flatten()
        copied = [
            n
            for n, t in candidates
            if holds_same_values(value, t) or (t.dim() == 2 and holds_same_values(value, t.t()))
        ]
        if copied:
            raise self_test_failure(copied, "were copied into a constant")


_FLOATING = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


def _constants(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for value in model.graph.initializers.values():
        if value.const_value is not None and not value.is_graph_input():  # a call may override an input's default
            yield value.const_value
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and "value" in node.attributes:
            yield node.attributes["value"].as_tensor()
