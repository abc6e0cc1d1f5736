"""Programs in half precision as emitted for CUDA: their dtypes are torch's, and their values as near as torch's.

No GPU computes here. ONNX Runtime's CPU takes float16 by casts of its own; of bfloat16 it has casts and nothing else,
so there every op is computed in float32 and rounded once, by the same rewrite as ops that CUDA lacks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

import lorac
from lorac.backends.onnx import build
from lorac.backends.onnx.export.exporter import TESTED_RELEASES
from lorac.backends.onnxruntime.devices import widening
from lorac.backends.onnxruntime.devices import widening as kernels_of_cuda
from lorac.backends.onnxruntime.dialect import DIALECTS
from lorac.ir.graph.graph import Graph
from lorac.testing import assert_close, assert_parity
from tests.backends.onnxruntime.half_hosts import NAMES, Reference
from tests.zoo import ZOO

F16, BF16 = torch.float16, torch.bfloat16
_HALF = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclass
class Made:
    """A program for CUDA whose sessions run here.

    Attributes:
        compiled: the model that runs it.
        graph: what it was emitted from.
        model: what was emitted for CUDA.
        reference: what it is compared with.
    """

    compiled: Any
    graph: Graph
    model: ir.Model
    reference: Reference


@functools.cache
def made(name: str, dtype: torch.dtype) -> Made:
    emitted_graphs: list[tuple[Graph, ir.Model]] = []
    cuda = DIALECTS["cuda"]
    widened = dataclasses.replace(cuda, late_rewrites=(*DIALECTS["cpu"].late_rewrites, widening.WidenHalfPrecision({})))
    here = cuda if dtype == F16 else widened

    def emit(graph: Graph, dialect: Any, observe: Any) -> ir.Model:
        emitted_graphs.append((graph, emit_as_ever(graph, cuda)))
        return emitted_graphs[-1][1] if dialect is cuda else emit_as_ever(graph, dialect, observe)

    emit_as_ever, reference = build.emit, Reference(name, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "emit", emit)
        patch.setitem(DIALECTS, "cpu", here)  # type: ignore[arg-type]  # a dict
        compiled = lorac.compile(
            reference.entry.fresh(dtype),
            reference.adapters,
            target="onnxruntime",
            active=None,
            example_inputs=reference.inputs(),
        )
    return Made(compiled, *emitted_graphs[0], reference)


QUICK = (("tiny_bert", F16), ("tiny_llama", BF16))
CASES = [
    pytest.param(name, dtype, marks=() if (name, dtype) in QUICK else pytest.mark.slow)
    for name in NAMES
    for dtype in (F16, BF16)
]


@pytest.mark.medium("an op that is widened where it has no kernel, and end_to_end/test_precision.py")
@pytest.mark.slow("a BERT", keep=["tiny_bert-dtype0"])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_answers_are_as_near_as_torchs(name: str, dtype: torch.dtype) -> None:
    """Four times what the base alone is off in half precision is allowed, and a tenth of a per mille."""
    case = made(name, dtype)
    outputs, reference = case.reference.entry.outputs, case.reference
    off = case.compiled(**reference.inputs(), adapters=None)
    for adapter, choice in reference.choices.items():
        answer = case.compiled(**reference.inputs(), adapters=choice)
        assert all(answer[output].dtype == dtype for output in outputs)
        assert_parity(answer, reference.of(adapter), reference.base, own_base=off, names=outputs)
    again = case.compiled(**reference.inputs(), adapters=None)
    assert all(torch.equal(off[output], again[output]) for output in outputs)


@pytest.mark.medium("an op that is widened where it has no kernel, and end_to_end/test_precision.py")
@pytest.mark.slow("a BERT", cases=["tiny_llama-*"])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_values_have_the_dtypes_of_torch(name: str, dtype: torch.dtype) -> None:
    if not torch.__version__.startswith(TESTED_RELEASES):
        pytest.skip("torch's own exporter traces the program again and numbers its values anew")
    case = made(name, dtype)
    traced = {n.name: n.meta["val"] for n in case.graph.fx.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    emitted = {str(v.name): v for node in case.model.graph.all_nodes() for v in node.outputs}
    assert all(value.dtype is not None for value in emitted.values())
    compared = {n: (to_torch_dtype(emitted[n].dtype), traced[n].dtype) for n in emitted.keys() & traced.keys()}  # type: ignore[arg-type]  # told
    assert len(compared) > len(emitted) / 4 and {dtype, torch.float32} <= {found for found, _ in compared.values()}
    assert not {n: both for n, both in compared.items() if both[0] != both[1]}


@pytest.mark.medium("an op that is widened where it has no kernel, and end_to_end/test_precision.py")
@pytest.mark.slow("a BERT", cases=["tiny_llama-*"])
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_slots_have_the_dtype_of_factors(name: str, dtype: torch.dtype) -> None:
    case = made(name, dtype)
    slots = {str(v.name): v.dtype for v in case.model.graph.inputs if v.name in case.graph.slots}
    assert slots.keys() == case.graph.slots.keys() and set(slots.values()) == {ir.DataType.FLOAT}


@pytest.mark.medium("an op that is widened where it has no kernel, and end_to_end/test_precision.py")
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_widens_ops_without_a_half_precision_kernel_on_cuda(name: str, dtype: torch.dtype) -> None:
    known = kernels_of_cuda.HALF_PRECISION_OPS[str(dtype).removeprefix("torch.")]
    for node in made(name, dtype).model.graph.all_nodes():
        if any(value is not None and value.dtype in _HALF for value in node.inputs):
            assert (node.domain, node.op_type) in known


@pytest.mark.medium("an op that is widened where it has no kernel, and end_to_end/test_precision.py")
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_norms_hold_their_sums_in_float32(name: str, dtype: torch.dtype) -> None:
    norms = [node for node in made(name, dtype).model.graph.all_nodes() if node.op_type.endswith("LayerNormalization")]
    assert len(norms) > 1
    for node in norms:
        assert node.inputs[0] is not None and node.inputs[0].dtype in _HALF
        assert node.attributes.get_int("stash_type", 1) == ir.DataType.FLOAT


def test_rejects_a_half_precision_artifact_on_the_cpu(tmp_path: Path) -> None:
    """Fused and settled it runs there only because this test has it run so."""
    given, adapters = ZOO["plain_mlp"].inputs(), {"a": lorac.LoRA(r=2, targets=["up"])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DIALECTS, "cpu", DIALECTS["cuda"])  # type: ignore[arg-type]  # a dict
        compiled: Any = lorac.compile(ZOO["plain_mlp"].fresh(F16), adapters, "onnxruntime", given, mode="fused")
    bound = compiled(**given)
    compiled.swap("a", settle=True)
    assert bound.dtype == F16 and {tensor.dtype for tensor in compiled.engine.memory.values()} == {F16}
    assert_close(compiled(**given), bound)
    compiled.save(tmp_path / "it")
    for device in (None, "cpu"):
        with pytest.raises(lorac.Unavailable, match="computes in float16, which ONNX Runtime cannot do on the CPU"):
            lorac.load(tmp_path / "it", device=device)


# The rewrite


def _model(op: str, dtype: ir.DataType, **attributes: int) -> ir.Model:
    x = ir.val("x", dtype=dtype, shape=ir.Shape([3, 4]))
    node = ir.Node("", op, [x], [ir.AttrInt64(name, value) for name, value in attributes.items()])
    node.outputs[0].name = "y"  # and no dtype: rewrites leave it out
    graph = ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 20}, name="it")
    return ir.Model(graph, ir_version=10)


def _ops(model: ir.Model) -> Iterator[str]:
    return (node.op_type for node in model.graph)


@pytest.mark.parametrize(
    ("op", "dtype", "wrapped"),
    [
        ("Sin", ir.DataType.BFLOAT16, True),
        ("Sin", ir.DataType.FLOAT16, False),
        ("Exp", ir.DataType.BFLOAT16, False),
        ("Sin", ir.DataType.FLOAT, False),
        ("Mish", ir.DataType.FLOAT16, True),
    ],
)
def test_widens_an_op_without_a_kernel(op: str, dtype: ir.DataType, wrapped: bool) -> None:
    model = _model(op, dtype)
    widening.WidenHalfPrecision().apply(model)
    assert list(_ops(model)) == (["Cast", op, "Cast"] if wrapped else [op])
    [output] = model.graph.outputs
    assert output.name == "y" and output.dtype in (dtype, None)


def test_rounds_a_widened_op_once() -> None:
    model = _model("Sin", ir.DataType.BFLOAT16)
    widening.WidenHalfPrecision().apply(model)
    first, op, last = model.graph
    assert first.attributes["to"].as_int() == op.outputs[0].dtype == ir.DataType.FLOAT
    assert last.attributes["to"].as_int() == last.outputs[0].dtype == ir.DataType.BFLOAT16
