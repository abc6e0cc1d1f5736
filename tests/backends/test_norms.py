"""Norms are one op each, whether their scale is a weight or an adapter's, and answer as eager does."""

import onnx_ir as ir
import torch

import lorac
from lorac.backends.onnx.files import MODEL
from tests import parity
from tests.zoo import ZOO


@torch.no_grad()
def test_rms_norms_are_onnxruntimes_own():
    entry = ZOO["tiny_llama"]
    model = entry.fresh()
    adapter = lorac.compile(model, {"a": lorac.LNTuning(targets=("norm", "input_layernorm"))}).adapters["a"]
    for name, tensor in adapter.replaced.items():
        adapter.replaced[name] = tensor * torch.linspace(0.7, 1.3, tensor.numel())
    eager = lorac.compile(model, {"a": adapter})
    emitted = lorac.compile(model, {"a": adapter}, target="onnxruntime")
    found = [node.op_type for node in ir.load(emitted.engine.folder / MODEL).graph]
    assert found.count("SimplifiedLayerNormalization") == sum("norm" in name for name, _ in model.named_parameters())
    assert not {"Reciprocal", "Sqrt"} & set(found)
    inputs = entry.inputs()
    parity.assert_parity(emitted(**inputs).logits, eager(**inputs).logits, model(**inputs).logits)
