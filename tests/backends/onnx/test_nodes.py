"""Programs for ONNX Runtime equal golden files node by node: four models, in every mode."""

from __future__ import annotations

import pytest

from tests.backends.onnx.nodes import CASES, compiled_case, node_lines
from tests.emitted import load_emitted
from tests.goldens import check


@pytest.mark.medium("the live program", cases=["llama_fused"])
@pytest.mark.slow(
    "a Llama's nodes, where adapters are live and where they are merged", keep=["llama_live", "llama_fused"]
)
@pytest.mark.parametrize("name", CASES)
def test_emitted_nodes_and_graph_equal_the_golden_files(name: str) -> None:
    compiled = compiled_case(name)
    emitted = load_emitted(compiled)
    check(f"nodes_{name}", "\n".join(node_lines(emitted)) + "\n")
    check(f"graph_{name}", str(compiled.graph["main"].after("cleanup")))
