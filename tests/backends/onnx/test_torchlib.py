"""Private parts of torch and onnxscript that lorac relies on."""

import operator

import onnx_ir as ir
import pytest
import torch
from onnxscript import evaluator
from torch import fx
from torch.onnx._internal.exporter import _core, _dispatching
from torch.onnx._internal.exporter._registration import ONNXRegistry

import lorac
from lorac.backends.onnx.export import exporter, torchlib
from lorac.backends.onnx.export.opsets import op, record_with
from lorac.testing import adapter_away, assert_close

aten = torch.ops.aten


@pytest.fixture(scope="module")
def registry():
    """All translations, as torch's exporter finds them for the version that it writes by default."""
    return ONNXRegistry.from_torchlib(opset_version=torchlib.OPSET)


def test_the_release_of_torch_was_tested():
    assert torch.__version__.startswith(exporter.TESTED_RELEASES)


@pytest.mark.parametrize("is_complex", [False, True])
def test_every_op_has_the_translation_that_torch_chooses(registry, is_complex):
    """By the whole registry, which takes seconds to make."""
    example = torch.ones(2, dtype=torch.complex64 if is_complex else torch.float32)
    graph = fx.Graph()
    operand = graph.placeholder("x")
    operand.meta["val"] = example
    differing = {}
    for metas in registry.functions.values():
        node = graph.call_function(metas[0].fx_target, (operand,))
        wanted, _ = _dispatching.dispatch(node, registry)
        candidates = torchlib._read_library().get(torchlib._key(node.target), ())
        found = next((function for function, for_complex in candidates if for_complex == is_complex), None)
        if found is not wanted:
            differing[str(node.target)] = (found, wanted)
    assert not differing


def test_translations_record_only_in_the_calling_context():
    """Neither onnxscript's evaluator nor torch's current tracer is read or set."""
    node = fx.Graph().call_function(aten.mul.Tensor, ())
    recorder, x = torchlib.Recorder(), torchlib.SymbolicTensor(torchlib.TENSOR_OPSET, name="x")
    x.dtype = ir.DataType.FLOAT
    before = evaluator.default(), _core.current_tracer
    with record_with(recorder):
        torchlib.find_translation(node, {})(x, x)
        _ = x + 1.0
    assert [made.op_type for made in recorder.take_nodes()] == ["Mul", "Constant", "Add"]
    assert (evaluator.default(), _core.current_tracer) == before


def test_functions_that_onnxscript_compiled_are_recorded_as_calls():
    node = fx.Graph().call_function(aten.isfinite.default, ())
    recorder, x = torchlib.Recorder(), torchlib.SymbolicTensor(torchlib.TENSOR_OPSET, name="x")
    x.dtype = ir.DataType.FLOAT
    with record_with(recorder):
        torchlib.find_translation(node, {})(x)
    assert [name for _, name, _ in recorder.functions] == [made.op_type for made in recorder.take_nodes()]


def test_pythons_functions_are_found_as_ops_are():
    node = fx.Graph().call_function(operator.add, (1, 2))
    assert torchlib.find_translation(node, {}) is not None


def test_the_signature_of_an_op_is_read_once():
    x, signatures = torchlib.SymbolicTensor(torchlib.TENSOR_OPSET, name="x"), torchlib._SIGNATURES
    with record_with(torchlib.Recorder()):
        op.Abs(x)
        known = signatures["", "Abs", 13]
        op.Abs(x)
    assert signatures["", "Abs", 13] is known


class Mixes(torch.nn.Module):
    """Mixes tokens by a Fourier transform, as FNet does."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(6, 6)

    def forward(self, x):
        return self.up(x + torch.fft.fftn(x, dim=(1, 2)).real)


def test_the_sizes_of_a_fourier_transform_vary():
    host, x = Mixes().eval(), torch.randn(4, 9, 6)
    adapter = adapter_away(lorac.LoRA(r=2), host, x, name="a", seed=0)
    dynamic = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    compiled = lorac.compile(host, adapter, "onnxruntime", {"x": x[:2, :5]}, dynamic_shapes=dynamic)
    eager = lorac.compile(host, adapter)
    with torch.no_grad():
        assert_close(compiled(x), eager(x))
