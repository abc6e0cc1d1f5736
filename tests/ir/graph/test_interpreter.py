"""The reference interpreter: every level of a graph gives the result of the eager backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac import ChoiceError
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.interpreter import resize_inputs
from lorac.testing import assert_close
from lorac.testing.parity import ROUNDING
from tests.captured import Stack, capture, captured_program, filled, graph_of, interpret, lower
from tests.parity import assert_parity, named_outputs

EXACT = ROUNDING[torch.float64]
"""Eager and the interpreter run the same ops in float64; only the order of a sum may differ."""


def _distance(y: object, y_ref: object) -> float:
    found, wanted = named_outputs(y), named_outputs(y_ref)
    assert found.keys() == wanted.keys()
    return max(float((found[k] - wanted[k]).norm() / wanted[k].norm()) for k in wanted)


@pytest.mark.medium("a plain model", cases=["plain_conv"])
@pytest.mark.slow("two plain models, and the golden nodes of a Llama", keep=["plain_mlp", "plain_conv"])
@pytest.mark.parametrize("name", ["plain_mlp", "plain_conv", "tiny_llama", "tiny_gpt2", "tiny_t5", "tiny_albert"])
def test_every_level_answers_as_eager(name: str) -> None:
    it = capture(name)
    with torch.no_grad():
        adapted, base = it.compiled(**it.inputs), it.compiled(**it.inputs, adapters=None)
    assert _distance(adapted, base) > 0.01, "the adapters hardly matter, so this decides nothing"
    seen = []

    def look(stage: str, graph: Graph) -> None:
        expected = adapted if graph.slots else base
        answer = interpret(graph, it.inputs, it.slots() if graph.slots else None)
        assert type(answer) is type(expected)
        assert _distance(answer, expected) <= EXACT, stage
        seen.append(graph.level.name)

    lower(it.graph, look)
    assert {"HOST", "ADAPTED", "EXPANDED"} <= set(seen)


@pytest.mark.medium("every level of a plain model, and the golden of fused weights")
def test_bound_weights() -> None:
    it = capture("tiny_llama", mode="fused")
    lower(it.graph)
    with torch.no_grad():
        expected = it.compiled(**it.inputs)
    assert all(name.endswith(":weight") for name in it.graph.slots)
    assert _distance(interpret(it.graph, it.inputs, it.slots()), expected) <= EXACT


@pytest.mark.medium("the kit compares ONNX Runtime with eager")
def test_onnxruntime_answers_as_the_interpreter() -> None:
    adapters = {"style": lorac.DoRA(r=3, targets=["query", "out"]), "patch": lorac.SHiRA(r=1, targets=["key"])}
    model, inputs = Stack(), {"x": torch.randn(2, 5, 10)}
    eager = lorac.compile(model, adapters=adapters)
    with torch.no_grad():
        for parameter in eager.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    eager.swap({"style": 0.7, "patch": 0.4})
    graph = graph_of("main", captured_program(model, inputs), eager.sites, eager.plans)
    lower(graph)
    y_ref = interpret(graph, inputs, filled(eager, graph))
    y_base = interpret(graph_of("main", captured_program(model, inputs), {}, {}), inputs)
    ort = eager.export(target="onnxruntime", example_inputs=inputs)
    assert_parity(ort(**inputs), y_ref, y_base, own_base=ort(**inputs, adapters=None))


@pytest.mark.medium("the self-test of every program, which exchanges its slots")
def test_every_slot_matters() -> None:
    it = capture("tiny_llama")
    lower(it.graph)
    filled = it.slots()
    before = interpret(it.graph, it.inputs, filled)
    for name, tensor in filled.items():
        if not tensor.is_floating_point():
            continue
        other = interpret(it.graph, it.inputs, {**filled, name: tensor + 1})
        assert _distance(other, before) > 0, name


def test_an_unfilled_slot_is_an_error() -> None:
    it = capture("plain_mlp")
    lower(it.graph)
    with pytest.raises(KeyError):
        interpret(it.graph, it.inputs, {})


def test_an_unknown_input_is_named() -> None:
    it = capture("plain_mlp")
    with pytest.raises(ChoiceError, match="tokenz"):
        interpret(it.graph, {**it.inputs, "tokenz": it.inputs["tokens"]})


class _Ties(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(x, 3, dim=-1).indices, torch.sort(x, dim=-1, descending=True).indices


def test_ties_go_to_the_lowest_index() -> None:
    x = torch.zeros(2, 40)
    x[1, 30:] = 1
    graph = graph_of("main", captured_program(_Ties(), (x,), ({0: torch.export.Dim("batch")},)), {}, {})
    top, order = interpret(graph, {"x": x})
    assert top.tolist() == [[0, 1, 2], [30, 31, 32]]
    assert order.tolist() == [list(range(40)), [*range(30, 40), *range(30)]]


class Bags(nn.Module):
    """Means of rows of a table, one for each offset into the ids."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.EmbeddingBag(20, 4), nn.Linear(4, 6)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        result: Tensor = self.out(self.table(ids, offsets))
        return result


@torch.no_grad()
def test_offsets_rise_at_other_sizes() -> None:
    model, ids, offsets = Bags().eval(), torch.arange(7), torch.tensor([0, 3])
    resized = resize_inputs({"ids": ids.flip(0), "offsets": offsets}, {("ids", 0): 8, ("offsets", 0): 3})
    assert resized["ids"].tolist() == [6, 5, 4, 3, 2, 1, 0, 6]
    assert resized["offsets"].tolist() == [0, 0, 3]
    free = {0: torch.export.Dim.AUTO}
    compiled = lorac.compile(
        model,
        [lorac.LoRA(r=2, targets=["out"])],
        target="onnxruntime",
        example_inputs=(ids, offsets),
        dynamic_shapes=(free, free),
    )
    ids, offsets = torch.arange(9), torch.tensor([0, 2, 5])
    assert_close(compiled(ids, offsets), model(ids, offsets))
