"""Models that other libraries have quantised, in ONNX Runtime: codes that its products take are taken as they are.

Neither library is installed where these run, so what they make is stood in for by classes of the same names and parts.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import lorac
from lorac.backends.onnx.files import read
from lorac.errors import CaptureFailed, LoracWarning, NotMergeable
from lorac.ir.host.packed import Codes
from lorac.testing.checks import assert_close


class IntxUnpackedToInt8Tensor(torch.Tensor):
    """As torchao's: int8 numbers with a scale and a zero point for each group of a row."""

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor, zero_point: Tensor, target_dtype: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype)

    def __init__(self, qdata: Tensor, scale: Tensor, zero_point: Tensor, target_dtype: Any) -> None:
        self.qdata, self.scale, self.zero_point, self.target_dtype = qdata, scale, zero_point, target_dtype

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            it = args[0]
            return cls(it.qdata, it.scale, it.zero_point, it.target_dtype)
        return function(*tree_map(lambda t: t.whole() if isinstance(t, cls) else t, args), **(kwargs or {}))

    def whole(self) -> Tensor:
        return Codes(8, self.qdata, self.scale, self.zero_point).dequantised()


class Linear8bitLt(nn.Linear):
    """As bitsandbytes': int8 numbers, and the largest value of each row."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return nn.functional.linear(x, weight.data * (weight.SCB / 127)[:, None], self.bias)


class Linear4bit(nn.Linear):
    """As bitsandbytes': numbers of a table, and a state without which they say nothing."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return nn.functional.linear(x, weight.quant_state.whole, self.bias)


class Params(torch.nn.Parameter):
    """Stands for the classes of their parameters."""


def numbers(bits: int, *shape: int) -> Tensor:
    half = 1 << bits - 1
    return torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.int8)


def in_torchao(layer: nn.Linear, bits: int, group: int, shifted: bool) -> nn.Linear:
    rows, groups = layer.out_features, layer.in_features // group
    scale = torch.rand(rows, groups, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.001
    zero = numbers(bits - 1, rows, groups) if shifted else torch.zeros(rows, groups, dtype=torch.int8)
    target = getattr(torch, f"int{bits}")
    weight = IntxUnpackedToInt8Tensor(numbers(bits, *layer.weight.shape), scale, zero, target)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def in_bitsandbytes(layer: nn.Linear, kind: type[nn.Linear]) -> nn.Linear:
    own = kind(layer.in_features, layer.out_features)
    whole = layer.weight.detach()
    if kind is Linear8bitLt:
        own.weight = Params(numbers(8, *whole.shape), requires_grad=False)
        own.weight.SCB = whole.abs().amax(1)  # type: ignore[attr-defined]  # as theirs has it
    else:
        own.weight = Params(torch.zeros(whole.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        own.weight.quant_state = SimpleNamespace(whole=whole)  # type: ignore[attr-defined]  # as theirs has it
    return own


MADE = {
    "torchao, 4 bits": lambda layer: in_torchao(layer, 4, 32, shifted=True),
    "torchao, 8 bits": lambda layer: in_torchao(layer, 8, 16, shifted=False),
    "torchao, rows": lambda layer: in_torchao(layer, 8, layer.in_features, shifted=True),
    "bitsandbytes, 8 bits": lambda layer: in_bitsandbytes(layer, Linear8bitLt),
}
X = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))


def model(how: Any) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential()
    made.add_module("site", how(nn.Linear(96, 40)))
    made.add_module("act", nn.Tanh())
    made.add_module("last", nn.Linear(40, 8))
    return made.eval()


def products(compiled: Any) -> list[onnx.NodeProto]:
    found, _ = read(compiled.engine.files, "main")
    return [node for node in found.graph.node if node.op_type == "MatMulNBits"]


@pytest.mark.parametrize("how", MADE)
@torch.no_grad()
def test_codes_are_taken_as_they_are(how: str, recwarn: pytest.WarningsRecorder) -> None:
    own = model(MADE[how])
    kind = type(own.site.weight if how.startswith("torchao") else own.site)
    told = {"target": "onnxruntime", "example_inputs": (X,), "accuracy_level": 1}
    compiled = lorac.compile(own, {"a": lorac.LoRA(r=2, targets=["site"])}, active=None, **told)
    assert not [w for w in recwarn if issubclass(w.category, LoracWarning)]
    assert_close(compiled(X), own(X))
    assert len(products(compiled)) == 1, "what came in float stays in float"
    weight: Any = own.site.weight
    whole = (weight.qdata if how.startswith("torchao") else weight.data).numpy()
    bits = 4 if "4 bits" in how else 8
    stored, held = read(compiled.engine.files, "main")
    name = next(t.name for t in stored.graph.initializer if t.name.endswith(f"_Q{bits}"))
    packed = (
        held[name]
        if name in held
        else onnx.numpy_helper.to_array(next(t for t in stored.graph.initializer if t.name == name))
    )
    spread = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1)
    assert np.array_equal(spread.reshape(len(whole), -1)[:, : whole.shape[1]], whole.astype(int) + (1 << bits - 1))
    assert type(own.site.weight if how.startswith("torchao") else own.site) is kind, "the host is as it was"
    assert compiled.sites["site"].packed == kind.__name__
    with pytest.raises(NotMergeable, match=f"'site' holds its weight as {kind.__name__}"):
        lorac.compile(own, {"a": lorac.LoRA(r=2, targets=["site"])}, mode="fused", **told)


@pytest.mark.parametrize("weights", [None, "int8"])
@torch.no_grad()
def test_codes_of_another_kind_are_dequantised_with_a_warning(
    weights: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(dequantize_4bit=lambda data, state: state.whole)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", library)
    own = model(lambda layer: in_bitsandbytes(layer, Linear4bit))
    told = {"target": "onnxruntime", "example_inputs": (X,), "self_test": False}
    says = "held as float32\n.*weights='int8'" if weights is None else "quantised anew, as int8"
    with pytest.warns(LoracWarning, match=f"1 weights came as Linear4bit, .*: they are {says}"):
        compiled = lorac.compile(own, weights=weights, **told)
    assert len(products(compiled)) == (0 if weights is None else 2)
    if weights is None:
        assert_close(compiled(X), own(X))


def test_what_a_call_has_repacked_is_refused() -> None:
    own = model(lambda layer: in_bitsandbytes(layer, Linear4bit))
    own.site.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(CaptureFailed, match="compile it before it is called"):
        lorac.compile(own, target="onnxruntime", example_inputs=(X,))
