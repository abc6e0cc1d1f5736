"""What is emitted for ONNX Runtime stays node for node what it was: four models, in every mode."""

from __future__ import annotations

import onnx_ir as ir
import pytest

import lorac
from lorac.backends.onnx.model_files import MODEL_FILE
from tests.backends.onnx.nodes import CASES, node_lines
from tests.goldens import check
from tests.zoo import ZOO


@pytest.mark.parametrize("name", CASES)
def test_an_emitted_program_and_its_graph_are_the_golden_ones(name: str) -> None:
    model, mode, adapters = CASES[name]
    entry = ZOO[model]
    options = {"mode": mode, "active": "a" if mode == "baked" else None, "self_test": False}
    compiled = lorac.compile(entry.fresh(), adapters, target="onnxruntime", example_inputs=entry.inputs(), **options)
    emitted = ir.load(compiled.engine.folder / MODEL_FILE)
    check(f"nodes_{name}", "\n".join(node_lines(emitted)) + "\n")
    check(f"graph_{name}", str(compiled.graph["main"].after("cleanup")))
