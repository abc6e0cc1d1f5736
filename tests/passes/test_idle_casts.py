"""A pass that lorac does not have takes two files, itself and this, and a place in a pipeline."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lorac.ir.graph.passes import Pass, run_pipeline
from lorac.passes.pipelines import lowering_passes
from lorac.testing import assert_close
from tests.captured import capture, interpret
from tests.passes.idle_casts import IdleCasts
from tests.refusing import refuses

*FIRST, LAST = lowering_passes()


@pytest.mark.medium("casts inside", cases=["behind"])
@pytest.mark.parametrize("passes", [[*FIRST, IdleCasts(), LAST], [*FIRST, LAST, IdleCasts()]], ids=["inside", "behind"])
def test_removes_casts_without_changing_outputs(passes: Sequence[Pass]) -> None:
    it, seen = capture("plain_mlp"), []
    before = interpret(it.graph, it.inputs)
    outcomes = dict(run_pipeline(it.graph, passes, lambda name, graph: seen.append(name)))
    assert outcomes["idle-casts"].changed
    assert "idle-casts" in seen
    expected = it.compiled(**it.inputs)
    assert_close(interpret(it.graph, it.inputs, it.slots()), expected)
    assert not torch.equal(before, expected)
    (again,) = run_pipeline(it.graph, [IdleCasts()])
    assert not again[1].changed


@pytest.mark.medium("test_removes_casts_without_changing_outputs")
def test_reports_the_casts_that_it_keeps() -> None:
    it = capture("tiny_llama")
    outcomes = dict(run_pipeline(it.graph, [*lowering_passes(), IdleCasts()]))
    dtypes = {node.name: node.meta["val"].dtype for node in it.graph.find(torch.ops.aten.to.dtype)}
    assert dtypes
    assert {skip.where: skip.why for skip in outcomes["idle-casts"].skipped} == {
        name: f"it casts to {dtype}" for name, dtype in dtypes.items()
    }


def test_rejects_a_place_before_expand() -> None:
    with refuses("wrong_level", match=r"'idle-casts' reads level expanded, .*\n  run 'expand' before it"):
        run_pipeline(capture("plain_mlp").graph, [*FIRST[:-2], IdleCasts(), *FIRST[-2:], LAST])
