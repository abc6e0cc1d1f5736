"""Guards are recorded for the trace that adds them, and for no other."""

import logging

import pytest
import torch
from torch import nn
from torch.export import Dim

import lorac
from lorac.frontend.capture.trace_guards import TraceGuard, record_guards
from lorac.testing import assert_close
from tests.refusing import refuses

LOGGER = logging.getLogger("torch.fx.experimental.symbolic_shapes")


class Fixing(nn.Module):
    """Asks whether its input has seven rows."""

    def __init__(self, during=lambda: None):
        super().__init__()
        self.during = during

    def forward(self, x):
        self.during()
        return x * 2 if x.shape[0] == 7 else x


def traced(module, guards):
    module.forward = record_guards(module.forward, guards)
    return torch.export.export(module, (torch.ones(7, 2),), dynamic_shapes={"x": {0: Dim.AUTO}})


def test_a_guard_is_recorded_with_the_line_that_needs_it():
    guards: list[TraceGuard] = []
    traced(Fixing(), guards)
    (guard,) = [guard for guard in guards if guard.condition.startswith("Eq(")]
    assert "test_trace_guards.py" in guard.line
    assert guard.line.endswith("return x * 2 if x.shape[0] == 7 else x")


def test_leaves_torchs_logger_unchanged():
    def state():
        return LOGGER.level, [*LOGGER.handlers], LOGGER.propagate, LOGGER.disabled

    before, during = state(), []
    program = traced(Fixing(lambda: during.append(state())), [])
    assert during == [before]
    environment = next(iter(program.graph.nodes)).meta["val"].fake_mode.shape_env
    assert environment.log is LOGGER


def test_each_trace_has_its_own_guards():
    guards: list[TraceGuard] = []
    traced(Fixing(), guards)
    count = len(guards)
    traced(Fixing(), [])
    assert len(guards) == count > 0


class Windows(nn.Module):
    """Computes within windows of a padded image, as swin does; each layer multiplies the conditions on its sizes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            b, h, w, c = x.shape
            x = nn.functional.pad(x, (0, 0, 0, -w % 4, 0, -h % 4))
            down, across = x.shape[1] // 4, x.shape[2] // 4
            windows = x.view(b, down, 4, across, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
            x = layer(windows).view(b, down, across, 4, 4, c).permute(0, 1, 3, 2, 4, 5)
            x = x.reshape(b, 4 * down, 4 * across, c)[:, :h, :w]
            x = nn.functional.pad(x, (0, 0, 0, w % 2, 0, h % 2))[:, ::2, ::2]
        return x


def compiled_with(height, width):
    torch.manual_seed(0)
    model = Windows().eval()
    shapes = ({0: Dim("rows"), 1: height, 2: width},)
    return model, lorac.compile(
        model, target="onnxruntime", example_inputs=(torch.randn(2, 30, 30, 6),), dynamic_shapes=shapes
    )


@pytest.mark.medium("end_to_end/test_fidelity.py: a size that the trace fixed")
@torch.no_grad()
def test_sizes_that_are_too_complex_are_fixed_at_once():
    """A trace that goes on takes minutes, and other sizes are refused in the end."""
    with pytest.warns(lorac.LoracWarning, match=r"(?s)axis 1 of 'x', axis 2 of 'x', at 30.*windows = x\.view"):
        model, compiled = compiled_with(Dim.AUTO, Dim.AUTO)
    x = torch.randn(3, 30, 30, 6)
    assert_close(compiled(x), model(x))
    with refuses("input_mismatch", match=r"size 62 on axis 1; the trace of the model fixed 30, at .*windows"):
        compiled(torch.randn(3, 62, 62, 6))


@pytest.mark.medium("end_to_end/test_fidelity.py: a size that the trace fixed")
def test_rejects_requested_sizes_with_conditions_that_are_too_complex():
    with refuses("capture_failed", match=r"(?s)windows = x\.view.*from the free sizes.*Dim\.AUTO"):
        compiled_with(Dim("height"), Dim("width"))
