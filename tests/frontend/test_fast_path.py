"""An encoder's Python code gives what torch's fused kernel gives, whose masks have another meaning than the code's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.frontend.fast_path import NoFastPath, find_unfused_forward
from lorac.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
AT_THE_END = torch.arange(5) >= torch.tensor([[3], [4]])
NUMBERS = -(torch.arange(5.0)[None] - torch.arange(5.0)[:, None]).abs()
MASKS = {
    "padding at the end": {"src_key_padding_mask": AT_THE_END},
    "padding in front": {"src_key_padding_mask": AT_THE_END.flip(1)},
    "a row of padding": {"src_key_padding_mask": torch.arange(5) >= torch.tensor([[0], [5]])},
    "infinite numbers": {"src_key_padding_mask": torch.zeros(2, 5).masked_fill(AT_THE_END, -torch.inf)},
    "numbers in front": {"src_key_padding_mask": torch.zeros(2, 5).masked_fill(AT_THE_END.flip(1), -1.0)},
    "numbers between tokens": {"mask": NUMBERS},
}


class Pooled(nn.Module):
    """The mean over all tokens, those of padding among them.

    Args:
        options: of a layer and of the encoder.
    """

    def __init__(self, **options: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=options.pop("norm_first", False))
        self.embed = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(8), **options)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding).mean(1))


def pooled(*, requires_grad: bool = False) -> Pooled:
    return Pooled().eval().requires_grad_(requires_grad)


@pytest.mark.parametrize("options", [{}, {"enable_nested_tensor": False}, {"mask_check": False}])
@pytest.mark.parametrize("masks", MASKS)
@torch.no_grad()
def test_masks_have_the_fused_kernels_meaning(masks: str, options: dict[str, bool]) -> None:
    if "in front" in masks and options == {"mask_check": False}:
        pytest.skip("without a check the caller promises padding at the end")
    if masks == "a row of padding" and options == {"enable_nested_tensor": False}:
        pytest.skip("the kernel's answer is NaN, and the code's is not")
    encoder = Pooled(**options).eval().encoder
    fused = encoder(X, **MASKS[masks])
    forwards = {layer: find_unfused_forward(layer) for layer in (*encoder.layers, encoder)}
    for layer, forward in forwards.items():
        layer.forward = forward
    with NoFastPath():
        assert_close(encoder(X, **MASKS[masks]), fused)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("target", ["embed", "linear1", "self_attn"])
@pytest.mark.parametrize("mode", ["live", "baked"])
def test_an_adapter_that_adds_nothing_leaves_pooled_padding(mode: str, target: str, gradients: bool) -> None:
    """With gradients on, torch itself leaves the fast path where an earlier layer trains."""
    model = pooled()
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=[target])}, mode=mode)
    with torch.set_grad_enabled(gradients):
        assert_close(compiled(X, AT_THE_END), model(X, AT_THE_END))
        if mode == "live":
            assert torch.equal(compiled(X, AT_THE_END, adapters=None), model(X, AT_THE_END))


def test_padding_counts_where_the_host_records_gradients() -> None:
    model = pooled(requires_grad=True)
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=["linear1"])})
    assert_close(compiled(X, AT_THE_END), model(X, AT_THE_END))
    with torch.no_grad():
        assert_close(compiled(X, AT_THE_END), model(X, AT_THE_END))


@torch.no_grad()
def test_programs_drop_padding_at_the_end_alone() -> None:
    model, inputs = pooled(), {"x": X, "padding": AT_THE_END}
    adapters = {"a": lorac.LoRA(r=2, targets=["linear1"])}
    compiled = lorac.compile(model, adapters, target="onnxruntime", example_inputs=inputs)
    for padding in (AT_THE_END, AT_THE_END.flip(1), torch.zeros_like(AT_THE_END)):
        assert_close(compiled(X, padding), model(X, padding))


@torch.no_grad()
def test_rejects_a_program_that_differs_from_the_host_as_it_is() -> None:
    """The fast path answers nonsense for padding in front where it does not check that there is none."""
    model = Pooled(mask_check=False).eval().requires_grad_(False)
    inputs = {"x": X, "padding": AT_THE_END.flip(1)}
    with pytest.raises(lorac.CaptureError, match="gave another program than Pooled"):
        lorac.compile(model, target="onnxruntime", example_inputs=inputs)
