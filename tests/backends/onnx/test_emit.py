"""Inputs, outputs and axes of an emitted program bear the model's own names."""

from __future__ import annotations

import gc
from typing import Any, NamedTuple

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.backends.onnx.emit import SITE_METADATA
from tests.backends.onnx.nodes import compiled_case
from tests.emitted import load_emitted
from tests.zoo import ZOO


def emitted(model: nn.Module, adapters: Any, **options: Any) -> dict[str, list[Any]]:
    """Name -> sizes of the inputs and outputs, a size as a number or a name."""
    return _sizes(_graph(lorac.compile(model, adapters, target="onnxruntime", self_test=False, **options)))


def _graph(compiled: lorac.Compiled) -> ir.Graph:
    return load_emitted(compiled).graph


def _sizes(graph: ir.Graph) -> dict[str, list[Any]]:
    values = [*graph.inputs, *graph.outputs]
    return {str(v.name): [size if isinstance(size, int) else size.value for size in v.shape] for v in values}


@pytest.fixture(scope="module")
def llama() -> lorac.Compiled:
    return compiled_case("llama_live")


def test_a_language_model(llama: lorac.Compiled) -> None:
    found = _sizes(_graph(llama))
    assert found["input_ids"] == found["attention_mask"] == ["batch", "length"]
    assert found["logits"][:2] == ["batch", "length"]
    path = "model.layers.0.self_attn.v_proj"
    assert found[f"{path}:a"][2] == found[f"{path}:b"][1] == f"{path}:rank"
    assert found[f"{path}:a"][0] == found[f"{path}:b"][0] == "adapters"
    assert not any(name.startswith("linear") for name in found)


def test_nothing_keeps_an_emitted_model_and_its_weights(llama: lorac.Compiled) -> None:
    gc.collect()
    kept = [
        found for found in gc.get_objects() if type(found) is ir.Graph and "model.norm.weight" in found.initializers
    ]
    assert llama.adapters and not kept


@pytest.mark.medium("the names of axes of a language model")
def test_an_encoder_and_its_decoder() -> None:
    entry = ZOO["tiny_t5"]
    found = emitted(entry.model(), {"a": lorac.LoRA(r=2, targets=["q"])})
    assert found["logits"][:2] == ["batch", "decoder_length"]
    assert found["encoder_last_hidden_state"][:2] == ["batch", "length"]


def test_nodes_that_read_a_slot_name_its_site(llama: lorac.Compiled) -> None:
    graph = _graph(llama)
    slots = [value for value in graph.inputs if SITE_METADATA in value.metadata_props]
    sites = {value: value.metadata_props[SITE_METADATA].split(", ") for value in slots}
    assert {path for paths in sites.values() for path in paths} >= set(llama.plans)
    for value, paths in sites.items():
        path = paths[0] if len(paths) == 1 else paths[0].rpartition(".")[0]
        readers = list(value.consumers())
        assert readers
        for node in readers:
            assert repr(path) in node.metadata_props["pkg.torch.onnx.name_scopes"]
            assert "modeling_llama.py" in node.metadata_props["pkg.torch.onnx.stack_trace"]


class Pair(NamedTuple):
    """Two tensors by name."""

    left: Tensor
    right: Tensor


class Host(nn.Module):
    """Answers in the structure that it was made for."""

    def __init__(self, structure: str) -> None:
        super().__init__()
        self.structure, self.layer = structure, nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, other: Tensor) -> Any:
        y, z = self.layer(x), x + other
        found: dict[str, Any] = {
            "tensor": y,
            "tuple": (y, z),
            "nested": {"scores": y, "hidden": (z, y * 2), "x": z * 2},
            "named": Pair(y, z),
            "passed": {"y": y, "same": y, "x": x},
            "parameters": {"y": y, "scale": self.scale.exp(), "layer.weight": self.layer.weight * self.scale},
        }
        return found[self.structure]


NAMES = {
    "tensor": ["output"],
    "tuple": ["output.0", "output.1"],
    "nested": ["scores", "hidden.0", "hidden.1", "x.output"],
    "named": ["output.0", "output.1"],
    "passed": ["y", "same", "x.output"],
    "parameters": ["y", "scale", "layer.weight"],
}


@pytest.mark.medium("a nested answer, a tensor and names of parameters", keep=["nested", "tensor", "parameters"])
@pytest.mark.parametrize("structure", NAMES)
@torch.no_grad()
def test_emits_outputs_of_every_structure(structure: str) -> None:
    model, inputs = Host(structure).eval(), (torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    shapes = ({0: torch.export.Dim("rows"), 1: torch.export.Dim.AUTO},) * 2
    options = {"example_inputs": inputs, "dynamic_shapes": shapes}
    found = emitted(model, {"a": lorac.LoRA(r=2)}, **options)
    slots = {name for name in found if ":" in name}
    assert [name for name in found if name not in slots | {"x", "other"}] == NAMES[structure]
    assert found["x"] == ["rows", "x.1", 4]
    compiled = lorac.compile(model, {}, target="onnxruntime", **options)
    larger = (torch.randn(5, 6, 4), torch.randn(5, 6, 4))
    answered, expected = compiled(*larger), model(*larger)
    assert type(answered) is type(expected)
    pairs = zip(torch.utils._pytree.tree_leaves(answered), torch.utils._pytree.tree_leaves(expected), strict=True)
    assert all(one.shape == two.shape for one, two in pairs)
