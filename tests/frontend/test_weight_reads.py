"""Layers whose weight another module reads: found in the reader's code, and refused where they are adapted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from lorac.frontend.layer_classes import find_weight_reads
from lorac.testing.eager_checks import assert_close
from tests.frontend.test_layer_hooks import drawn
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


class Aside(Reader):
    """It reads the weight in a way that its code does not show."""

    def _multiply(self, x: Tensor) -> Tensor:
        layer = next(self.children())
        return F.linear(x, layer.weight, layer.bias)


def compiled_of(model: nn.Module, target: str, mode: str, targets: Sequence[str] = ("qkv", "out")) -> lorac.Compiled:
    adapter = drawn(model, targets)
    return lorac.compile(model.eval(), [adapter], target=target, mode=mode, example_inputs=(X,))


def test_reads_are_found_in_the_code_of_a_class() -> None:
    assert find_weight_reads(Reader()) == {"qkv": False}
    assert find_weight_reads(nn.MultiheadAttention(4, 2)) == {"out_proj": False}
    assert find_weight_reads(nn.Linear(4, 4)) == {}
    torchvision = pytest.importorskip("torchvision.models.swin_transformer")
    assert find_weight_reads(torchvision.ShiftedWindowAttention(8, [2, 2], [0, 0], 2)) == {"qkv": False, "proj": False}


@pytest.mark.parametrize(("target", "mode"), SETTINGS)
def test_a_layer_that_is_read_is_refused(target: str, mode: str) -> None:
    with refuses("site_unsupported", match="'qkv' is not called: Reader reads its weight instead"):
        compiled_of(Reader(), target, mode)
    compiled = compiled_of(Reader(), target, mode, ["out"])
    compiled.swap(None)


@pytest.mark.parametrize(("target", "mode"), SETTINGS)
def test_a_layer_that_may_be_read_is_refused_where_it_is(target: str, mode: str) -> None:
    with refuses("site_unsupported", match="'qkv' is not called: .* reads its weight instead"):
        compiled_of(Choosing(False), target, mode)(X)
    compiled = compiled_of(Choosing(True), target, mode)
    changed = compiled(X)
    compiled.swap(None)
    assert not torch.allclose(compiled(X), changed)


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_program_shows_any_other_read(mode: str) -> None:
    with refuses("site_unsupported", match="'qkv' is not called: 'main' reads its weight instead"):
        compiled_of(Aside(), "onnxruntime", mode)


def test_a_read_layer_runs_while_no_adapter_acts_there() -> None:
    model = Choosing(False)
    compiled = compiled_of(model, "eager", "live")
    compiled.swap(None)
    assert_close(compiled(X), model(X))
