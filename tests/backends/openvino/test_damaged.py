"""Damaged artifacts of OpenVINO: what is wrong with an op is said before OpenVINO reads it, which believes a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorac
from lorac.backends.onnx.model_files import MODEL_FILE
from lorac.storage import artifact
from tests.refusing import refuses

pytest.importorskip("openvino")
X = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 24)).eval()
    compiled = lorac.compile(host, {"a": lorac.LoRA(r=2, targets=["0", "2"])}, "openvino", (X,), mode="fused")
    folder = tmp_path_factory.mktemp("sound") / "it"
    compiled.save(folder)
    return folder


def damaged(sound: Path, folder: Path, change: Callable[[Any], None]) -> Path:
    """Write an artifact with another model, of which hashes and seal are right, as a stranger can make them."""
    import onnx

    shutil.copytree(sound, folder)
    model = onnx.ModelProto.FromString((folder / MODEL_FILE).read_bytes())
    change(model.graph)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    fields = json.loads((folder / artifact.MANIFEST).read_text())
    fields["files"] = {k: v for k, v in artifact.describe_files(folder).items() if k != artifact.MANIFEST}
    artifact.write_manifest(folder / artifact.MANIFEST, fields)
    return folder


def _tanh(graph: Any) -> Any:
    return next(node for node in graph.node if node.op_type == "Tanh")


def _lacks_an_operand(graph: Any) -> None:
    _tanh(graph).op_type = "Pad"


def _has_more_operands(graph: Any) -> None:
    _tanh(graph).input.extend([graph.node[0].output[0]] * 40)


def _reads_a_later_result(graph: Any) -> None:
    _tanh(graph).input[0] = graph.node[-1].output[0]


def _reads_another_type(graph: Any) -> None:
    import onnx

    graph.initializer.append(onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [24], [b"a"] * 24))
    graph.node[-1].input[1] = "words"


def _asks_for_terabytes(graph: Any) -> None:
    import onnx

    graph.initializer.append(onnx.helper.make_tensor("sizes", onnx.TensorProto.INT64, [2], [1 << 20, 1 << 22]))
    graph.initializer.append(onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0]))
    graph.node.append(onnx.helper.make_node("Expand", ["one", "sizes"], ["wide"]))
    graph.node.append(onnx.helper.make_node("ReduceSum", ["wide"], ["sum"], keepdims=0))
    graph.node.append(onnx.helper.make_node("Add", [graph.output[0].name, "sum"], ["more"]))
    graph.output[0].name = "more"


DAMAGES = [_lacks_an_operand, _has_more_operands, _reads_a_later_result, _reads_another_type, _asks_for_terabytes]


@pytest.mark.parametrize("change", DAMAGES)
def test_rejects_ops_that_do_not_take_their_operands(sound: Path, tmp_path: Path, change: Any) -> None:
    folder = damaged(sound, tmp_path / "it", change)
    with refuses("artifact_error", match="the model of this artifact is not one that lorac writes"):
        lorac.load(folder)


def test_loads_as_the_caller_trusts_it(sound: Path, tmp_path: Path) -> None:
    def change(graph: Any) -> None:
        _tanh(graph).input[0] = graph.node[0].output[0]  # it reads another value of the same type

    folder = damaged(sound, tmp_path / "it", change)
    for trust in (True, False):
        assert lorac.load(folder, trust=trust)(X).shape == X.shape
