"""Passes over emitted programs: they report, they are verified, and a second run changes nothing."""

from __future__ import annotations

import onnx_ir as ir
import pytest
import torch

import lorac
from lorac.backends.onnx.passes import OnnxPass, run_passes, verify_model
from lorac.backends.onnxruntime.dialect import DIALECTS
from lorac.ir.graph.graph import Skip
from lorac.ir.graph.passes import PassResult
from tests.refusing import refuses

MODEL = """<ir_version: 9, opset_import: ["" : 18]>
agraph (float[b, 4] x) => (float[b, 4] y) {
  on = Constant <value = bool {1}> ()
  h = Tanh(x)
  y = If (on) <then_branch = taken () => (float[b, 4] t) { t = Neg(h) },
               else_branch = other () => (float[b, 4] e) { e = Identity(x) }>
}"""


class Break(OnnxPass):
    """Reads a value that nothing computes."""

    name = "break"

    def apply(self, model: ir.Model) -> PassResult:
        node = next(node for node in model.graph.all_nodes() if node.op_type == "Neg")
        node.replace_input_with(0, ir.val("nowhere"))
        return PassResult(changed=True)


def test_rejects_a_read_of_an_undefined_value_and_names_the_pass():
    model = ir.from_onnx_text(MODEL)
    verify_model(model, after="capture")
    with refuses("verification_failed", match=r"after the pass 'break' Neg '.*' reads 'nowhere'"):
        run_passes(model, [Break()])


def test_rejects_a_read_before_the_value_is_computed():
    model = ir.from_onnx_text(MODEL)
    tanh = next(node for node in model.graph if node.op_type == "Tanh")
    model.graph.remove(tanh)
    model.graph.append(tanh)
    with refuses("verification_failed", match="reads 'h', which nothing before it computes"):
        verify_model(model, after="a move")


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=list(DIALECTS))
def test_names_are_unique_and_a_second_run_changes_nothing(dialect):
    passes = (*dialect.early_rewrites, *dialect.late_rewrites)
    assert len({step.name for step in passes}) == len(passes)
    model = ir.from_onnx_text(MODEL)
    for _ in range(2):
        run_passes(model, passes, lambda name, result: pytest.fail(name) if result.changed else None)


class Modulated(torch.nn.Module):
    """A norm whose scale is computed for every row, and layers of two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = torch.nn.Linear(4, 48), torch.nn.Linear(48, 3)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        norm = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.out(norm * (1 + self.scale(time)[:, None]))


def test_the_graph_lists_skips_of_passes():
    compiled = lorac.compile(
        Modulated().eval(),
        {"a": lorac.LoRA(r=2, targets=["scale"])},
        target="onnxruntime",
        active=None,
        weights="int8",
        example_inputs=(torch.randn(2, 5, 48), torch.randn(2, 4)),
    )
    skipped = compiled.graph["main"].skipped
    assert {skip.why for skip in skipped["fuse-ops"]} == {"the scale is not a vector along the last axis"}
    assert skipped["quantise-weights"] == (Skip("scale.weight", "rows shorter than a block of 32"),)
    assert "weights that stay as they are, rows shorter than a block of 32: scale.weight" in str(compiled.explain())
