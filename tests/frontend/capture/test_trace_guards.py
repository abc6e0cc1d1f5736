"""Guards are recorded for the trace that adds them, and for no other."""

import logging

import torch
from torch import nn
from torch.export import Dim

from lorac.frontend.capture.trace_guards import TraceGuard, record_guards

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


def test_torchs_logger_stays_as_it_is():
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
