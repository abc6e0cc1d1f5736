"""Ops that a target would not compute are listed before anything is built, each with its module and line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorac
from tests.backends.tensorrt.building import quietly

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Bits(nn.Module):
    """A layer followed by bitwise ops."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        whole = (self.site(x) * 8).to(torch.int32)
        odd = whole & 1
        other = whole ^ 3
        return x + odd + other


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Bits()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.medium("report/test_explain.py")
def test_every_op_is_named_with_its_module_and_line():
    eager = lorac.compile(Holds().eval(), {"a": lorac.LoRA(r=1, targets=["site"])}, example_inputs=(X,))
    stages = eager.graph["main"].stages
    report = eager.explain(target="tensorrt")
    first, second = report.unsupported_ops
    assert first.startswith("BitwiseAnd, which 'inner' asks for, line ") and "test_explain.py" in first
    assert (
        second.startswith("BitwiseXor, which 'inner' asks for, line ") and first.split(",")[-1] != second.split(",")[-1]
    )
    assert f"tensorrt does not compute {first}" in str(report)
    assert eager.explain().unsupported_ops == () and eager.graph["main"].stages == stages
    with pytest.raises(lorac.Unavailable, match=r"BitwiseAnd, .*; nor BitwiseXor, "):
        eager.export(target="tensorrt")
    assert "onnxruntime claims every op of the program" in str(eager.explain(target="onnxruntime"))


def test_rejects_explain_for_a_released_model():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    built = quietly(model=model, adapters={}, example_inputs=(X,))
    with pytest.raises(lorac.Unavailable, match="this program no longer holds"):
        built.explain(target="onnxruntime")
    with pytest.raises(lorac.OptionError, match="there is no target 'tensort'"):
        lorac.compile(model, {}, example_inputs=(X,)).explain(target="tensort")
