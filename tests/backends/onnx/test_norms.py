"""Norms are one op each, whether their scale is a weight or an adapter's, and answer as eager does."""

import pytest
import torch

import lorac
from lorac.testing import assert_close
from tests import parity
from tests.emitted import load_emitted
from tests.zoo import ZOO


@pytest.mark.medium(
    "test_a_norm_scaled_for_every_row_is_none_of_them, and the golden nodes of a Llama, which have its norms"
)
@torch.no_grad()
def test_emits_onnxruntimes_rms_norm():
    entry = ZOO["tiny_llama"]
    model = entry.fresh()
    adapter = lorac.compile(model, {"a": lorac.LNTuning(targets=("norm", "input_layernorm"))}).adapters["a"]
    for name, tensor in adapter.replaced.items():
        adapter.replaced[name] = tensor * torch.linspace(0.7, 1.3, tensor.numel())
    eager = lorac.compile(model, {"a": adapter})
    emitted = lorac.compile(model, {"a": adapter}, target="onnxruntime")
    found = [node.op_type for node in load_emitted(emitted).graph]
    assert found.count("SimplifiedLayerNormalization") == sum("norm" in name for name, _ in model.named_parameters())
    assert not {"Reciprocal", "Sqrt"} & set(found)
    inputs = entry.inputs()
    parity.assert_parity(emitted(**inputs).logits, eager(**inputs).logits, model(**inputs).logits)


class Modulated(torch.nn.Module):
    """A norm whose scale is computed for every row, as diffusion transformers have it."""

    def __init__(self):
        super().__init__()
        self.scale, self.out = torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)

    def forward(self, x, time):
        norm = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.out(norm * (1 + self.scale(time)[:, None]))


@torch.no_grad()
def test_a_norm_scaled_for_every_row_is_none_of_them():
    host = Modulated().eval()
    example = (torch.randn(2, 5, 6), torch.randn(2, 4))
    adapter = lorac.LoRA(r=2, targets=["scale", "out"])
    compiled = lorac.compile(host, {"a": adapter}, target="onnxruntime", example_inputs=example, active=None)
    for batch in (2, 3):
        call = torch.randn(batch, 5, 6), torch.randn(batch, 4)
        assert_close(compiled(*call), host(*call))
