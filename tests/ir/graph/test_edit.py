"""Edits of an ExportedProgram, and the private fields of torch.export that they rest on."""

from __future__ import annotations

import pytest
import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from lorac.ir.graph import ops
from lorac.ir.graph.edit import (
    add_dimension,
    add_inputs,
    add_outputs,
    drop_unused_state,
    inline,
    insert_repeated_call,
    trace_function,
    update_signature,
)
from lorac.ir.graph.nodes import SLOTS_KEYWORD, copy_provenance
from lorac.testing import assert_close
from tests.captured import captured_program
from tests.zoo import ZOO


@pytest.fixture
def program() -> ExportedProgram:
    entry = ZOO["plain_mlp"]
    return captured_program(entry.fresh(), entry.inputs())


def test_private_fields_of_torch_export(program: ExportedProgram) -> None:
    """Where a new torch fails here, look at `lorac/ir/graph/edit.py` before the range in pyproject.toml is widened."""
    assert isinstance(program._range_constraints, dict)
    assert program.range_constraints == program._range_constraints
    assert program._module_call_graph is not None
    entry = program._module_call_graph[0]
    assert entry.fqn == ""
    assert entry.signature is not None
    for field in ("inputs", "outputs", "in_spec", "out_spec", "forward_arg_names"):
        getattr(entry.signature, field)
    assert isinstance(program._guards_code, list)
    assert isinstance(program._example_inputs, tuple)
    args, kwargs = program._example_inputs
    assert isinstance(args, tuple)
    assert isinstance(kwargs, dict)


def test_adds_inputs_to_the_signature(program: ExportedProgram) -> None:
    rank = add_dimension(program, "rank", hint=3)
    (node,) = add_inputs(program, {"up:a": ((10, rank), torch.float32)}).values()
    output = next(iter(reversed(program.graph.nodes)))
    (y,) = output.args[0]

    def scaled(y: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor]:
        return (y * (1 + a.sum()),)

    _, (changed,) = inline(program, output, scaled, [y, node])
    output.args = ((changed,),)
    update_signature(program)
    assert str(rank) in {str(symbol) for symbol in program.range_constraints}
    inputs = ZOO["plain_mlp"].inputs()
    expected = ZOO["plain_mlp"].model()(**inputs)
    runnable = program.module()
    for width in (0, 1, 5):
        a = torch.full((10, width), 0.1)
        found = runnable(**inputs, **{SLOTS_KEYWORD: {"up:a": a}})
        assert_close(found, expected * (1 + a.sum()))
    with pytest.raises(Exception, match="10"):
        runnable(**inputs, **{SLOTS_KEYWORD: {"up:a": torch.zeros(9, 1)}})


def test_adds_outputs_after_the_models(program: ExportedProgram) -> None:
    hidden = next(n for n in program.graph.nodes if n.op == "call_function" and n.target is torch.ops.aten.tanh.default)
    add_outputs(program, {"hidden": hidden})
    update_signature(program)
    inputs = ZOO["plain_mlp"].inputs()
    y, extra = program.module()(**inputs)
    assert torch.equal(y, ZOO["plain_mlp"].model()(**inputs))
    assert extra["hidden"].shape == (2, 5, 6)


def test_state_that_nothing_reads_is_dropped(program: ExportedProgram) -> None:
    site = next(n for n in program.graph.nodes if n.op == "call_function" and n.args[-1] == "up")
    weight = site.args[1]
    (slot,) = add_inputs(program, {"up:weight": ((14, 10), torch.float32)}).values()
    site.args = (site.args[0], slot, *site.args[2:])
    assert drop_unused_state(program) == ["up.weight"]
    update_signature(program)
    assert weight not in program.graph.nodes
    assert "up.weight" not in program.state_dict
    assert "up.bias" in program.state_dict
    assert all(spec.target != "up.weight" for spec in program.graph_signature.input_specs)
    inputs = ZOO["plain_mlp"].inputs()
    expected = ZOO["plain_mlp"].model()(**inputs)
    original = ZOO["plain_mlp"].model().get_parameter("up.weight")
    assert torch.equal(program.module()(**inputs, **{SLOTS_KEYWORD: {"up:weight": original}}), expected)


def test_new_nodes_keep_the_provenance_of_the_old(program: ExportedProgram) -> None:
    old = next(n for n in program.graph.nodes if n.op == "call_function" and n.args[-1] == "up")
    with program.graph.inserting_before(old):
        new = program.graph.call_function(torch.ops.aten.relu.default, (old.args[0],))
    copy_provenance(new, old)
    assert new.meta["stack_trace"] == old.meta["stack_trace"]
    assert new.meta["nn_module_stack"] == old.meta["nn_module_stack"]


def test_slots_are_user_inputs(program: ExportedProgram) -> None:
    add_inputs(program, {"up:c": ((14,), torch.float32)})
    spec = program.graph_signature.input_specs[-1]
    assert spec.kind is InputKind.USER_INPUT


def test_traces_operands_with_the_same_example_separately() -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() + x.cos()

    program = torch.export.export(Doubled(), (torch.randn(2, 3),))
    one, other = (node for node in program.graph.nodes if str(node.target) in {"aten.sin.default", "aten.cos.default"})
    other.meta["val"] = one.meta["val"]
    traced = trace_function(program, lambda a, b: (a - b,), [one, other])
    (difference,) = (node for node in traced.graph.nodes if node.op == "call_function")
    assert difference.args[0] is not difference.args[1]


def test_values_of_equal_calls_are_computed_once(program: ExportedProgram) -> None:
    call = next(n for n in program.graph.nodes if n.op == "call_function" and n.args[-1] == "up")
    x, weight, bias, _ = call.args
    known: dict[object, object] = {}
    one, other = (
        insert_repeated_call(program, known, call, ops.LINEAR, x, weight, bias, site) for site in ("up", "elsewhere")
    )
    assert one.meta["val"] is other.meta["val"]
    assert one.meta["val"].shape == call.meta["val"].shape
    wide, double = (
        insert_repeated_call(program, known, call, torch.ops.aten.cat.default, [x] * times, -1) for times in (2, 3)
    )
    assert wide.meta["val"].shape[-1] * 3 == double.meta["val"].shape[-1] * 2
    as_float, as_double = (
        insert_repeated_call(program, known, call, torch.ops.aten.zeros_like.default, x, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert (as_float.meta["val"].dtype, as_double.meta["val"].dtype) == (torch.float32, torch.float64)
