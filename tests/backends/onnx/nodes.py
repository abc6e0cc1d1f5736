"""The emitted programs of four models as lists of nodes: ops, attributes and slot inputs, no other names."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

import lorac
from tests.zoo import ZOO

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama_live": (
        "tiny_llama",
        "live",
        {"a": lorac.LoRA(r=3), "b": lorac.DoRA(r=2, targets=["q_proj", "v_proj"]), "c": lorac.IA3(targets=["k_proj"])},
    ),
    "llama_fused": ("tiny_llama", "fused", {"a": lorac.LoRA(r=3, targets=["q_proj", "embed_tokens"])}),
    "bert_live": ("tiny_bert", "live", {"a": lorac.MeteoRA(r=2, experts=3, top_k=2, targets=["query", "value"])}),
    "vit_live": ("tiny_vit", "live", {"a": lorac.OFT(block_size=4, r=0), "b": lorac.AdapterTune(r=2)}),
    "resnet_live": ("resnet18", "live", {"a": lorac.LoRA(r=2, targets=["layer1.0.conv1", "fc"])}),
    "resnet_baked": ("resnet18", "baked", {"a": lorac.LoRA(r=2, targets=["layer1.0.conv1", "fc"])}),
}
"""Name -> the model of the zoo, the mode, and the adapters."""


@functools.cache
def compiled_case(name: str) -> lorac.Compiled:
    """Return a case compiled for ONNX Runtime, once for all tests that read it."""
    model, mode, adapters = CASES[name]
    entry = ZOO[model]
    options = {"mode": mode, "active": "a" if mode == "baked" else None, "self_test": False}
    return lorac.compile(entry.fresh(), adapters, target="onnxruntime", example_inputs=entry.inputs(), **options)


def node_lines(model: ir.Model) -> list[str]:
    """One line per slot input, then one per node: domain, op and attributes; nested graphs below theirs."""
    slots = sorted(str(value.name) for value in model.graph.inputs if ":" in str(value.name))
    return [*(f"slot {name}" for name in slots), *_nodes(model.graph, "")]


def _nodes(graph: ir.Graph, indent: str) -> Iterator[str]:
    for node in graph:
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        plain = [a for a in node.attributes.values() if a.type not in (ir.AttributeType.GRAPH, ir.AttributeType.TENSOR)]
        yield f"{indent}{op}({', '.join(f'{a.name}={a.value}' for a in sorted(plain, key=lambda a: a.name))})"
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _nodes(attribute.as_graph(), indent + "  ")
