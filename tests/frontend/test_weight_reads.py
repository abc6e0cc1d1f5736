"""Layers whose weight another module reads: found in the reader's code, and adapted where they are called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

import lorac
from lorac.frontend.layer_classes import is_only_read
from lorac.testing import assert_close
from tests import parity
from tests.peft_files import make_peft
from tests.refusing import refuses

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
SETTINGS = [("eager", "live"), ("eager", "fused"), ("onnxruntime", "live"), ("onnxruntime", "fused")]


class Reader(nn.Module):
    """It multiplies by a layer's weight, as swin's attention does, and calls another whose dtype it asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self._multiply(x)).to(self.out.weight.dtype))

    def _multiply(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.qkv.bias)


class Choosing(Reader):
    """It reads the weight or calls the layer, as timm's swinv2 does."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.calls = calls

    def _multiply(self, x: Tensor) -> Tensor:
        return self.qkv(x) if self.calls else super()._multiply(x)


class Aliasing(Reader):
    """It reads the weight by a name that its code does not connect with the layer, and calls the layer too.

    Baked, as in a model that PEFT has merged, the weight that it reads is the merged one.
    """

    def _multiply(self, x: Tensor) -> Tensor:
        layer = self.qkv
        return F.linear(x, layer.weight, layer.bias) + self.qkv(x)


MODELS: list[Callable[[], Reader]] = [Reader, lambda: Choosing(False), lambda: Choosing(True)]


def test_reads_are_found_in_the_code_of_a_class() -> None:
    assert is_only_read("qkv", Reader())
    assert not is_only_read("out", Reader())
    assert not is_only_read("qkv", Choosing(False))
    assert is_only_read("out_proj", nn.MultiheadAttention(4, 2))
    torchvision = pytest.importorskip("torchvision.models.swin_transformer")
    assert is_only_read("qkv", torchvision.ShiftedWindowAttention(8, [2, 2], [0, 0], 2))


@pytest.mark.medium("live; eager, and two other readers on ONNX Runtime", cases=["*-fused", "<lambda>-onnxruntime*"])
@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "target", "mode"),
    [
        *((make, *setting) for make in MODELS for setting in [*SETTINGS, ("eager", "baked")]),
        *((Aliasing, *setting) for setting in SETTINGS),
    ],
)
def test_an_adapter_acts_on_calls_as_pefts_layer_does(
    make: Callable[[], nn.Module], target: str, mode: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    oracle = make_peft(model, tmp_path, LoraConfig(r=2, target_modules=["qkv", "out"]), inputs={"x": X})
    told = pytest.warns(
        lorac.LoracWarning, match="no effect at 'qkv', whose weights are read and which are never called"
    )
    with told if type(model) is Reader else contextlib.nullcontext():
        compiled = lorac.compile(model, {"a": tmp_path}, target=target, mode=mode, example_inputs=(X,))
    parity.assert_parity(compiled(X), oracle(X), model(X))
    if mode == "baked":
        return
    compiled.swap(None)
    assert_close(compiled(X), model(X))
    compiled.swap("a")
    parity.assert_parity(compiled(X), oracle(X), model(X))


@pytest.mark.parametrize(("target", "mode"), SETTINGS)
def test_an_adapter_that_acts_nowhere_is_refused(target: str, mode: str) -> None:
    adapter = lorac.LoRA(r=2, targets=["qkv"])
    with refuses("site_unreached", match="adapter 'lora' has no effect: it acts on 'qkv'"):
        lorac.compile(Reader(), [adapter], target=target, mode=mode, example_inputs=(X,))


@torch.no_grad()
def test_merged_weights_move_with_a_baked_model() -> None:
    model = Choosing(True)
    adapter = lorac.compile(model, [lorac.LoRA(r=2, targets=["qkv"])], example_inputs=(X,)).adapters["lora"]
    adapter.tensors["qkv"]["lora_B"].normal_()
    compiled = lorac.compile(model, [adapter], mode="baked", example_inputs=(X,))
    assert isinstance(compiled, nn.Module)
    before = compiled(X)
    assert_close(compiled.double()(X.double()).float(), before)
