"""Where an artifact's ONNX file may keep its tensors: in the file next to it, wherever ONNX lets a tensor be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import lorac
from lorac.backends.onnx.model_files import MODEL_FILE, WEIGHTS_FILE, load_checked_model
from lorac.frontend.components import MAIN_GRAPH
from lorac.storage.open_file import open_files

FLOAT = TensorProto.FLOAT


def external(**fields: str) -> TensorProto:
    """A tensor (2, 3) that lies in a file: the first 24 bytes of the one next to the model, unless said otherwise."""
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[2, 3], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": WEIGHTS_FILE, "offset": "0", "length": "24", **fields}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph(*nodes: onnx.NodeProto, name: str = "g") -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [])


def constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["w"], value=tensor)


def sparse(tensor: TensorProto) -> onnx.SparseTensorProto:
    indices = helper.make_tensor("i", TensorProto.INT64, [2], [0, 1])
    return onnx.SparseTensorProto(values=tensor, indices=indices, dims=[4])


def initializer(tensor: TensorProto) -> onnx.ModelProto:
    made = graph()
    made.initializer.append(tensor)
    return helper.make_model(made)


def sparse_initializer(tensor: TensorProto) -> onnx.ModelProto:
    made = graph()
    made.sparse_initializer.append(sparse(tensor))
    return helper.make_model(made)


def in_branch(tensor: TensorProto) -> onnx.ModelProto:
    inner = graph(name="inner")
    inner.initializer.append(tensor)
    middle = graph(helper.make_node("Loop", ["n", "c"], ["y"], body=inner), name="middle")
    return helper.make_model(graph(helper.make_node("If", ["c"], ["y"], then_branch=middle, else_branch=graph())))


def constant_in_branch(tensor: TensorProto) -> onnx.ModelProto:
    inner = graph(constant(tensor), name="inner")
    return helper.make_model(graph(helper.make_node("If", ["c"], ["y"], then_branch=graph(), else_branch=inner)))


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    opset = helper.make_opsetid("", 18)
    function = helper.make_function("own", "f", [], ["w"], [constant(tensor)], [opset])
    return helper.make_model(graph(), functions=[function])


def in_list(tensor: TensorProto) -> onnx.ModelProto:
    return helper.make_model(graph(helper.make_node("Own", [], ["y"], domain="own", many=[tensor])))


def sparse_constant(tensor: TensorProto) -> onnx.ModelProto:
    return helper.make_model(graph(helper.make_node("Constant", [], ["w"], sparse_value=sparse(tensor))))


PLACES = (
    initializer,
    sparse_initializer,
    lambda tensor: helper.make_model(graph(constant(tensor))),
    in_branch,
    constant_in_branch,
    in_function,
    in_list,
    sparse_constant,
)
IDS = ["initializer", "sparse", "constant", "branch", "constant in a branch", "function", "list", "sparse constant"]
AWAY: dict[str, TensorProto] = {
    "another file": external(location="elsewhere"),
    "absolute": external(location="/etc/passwd"),
    "parent": external(location=f"../{WEIGHTS_FILE}"),
    "no file": TensorProto(name="w", data_type=FLOAT, dims=[2], data_location=TensorProto.EXTERNAL),
    "beyond the end": external(offset="8"),
    "longer than the file": external(length="25"),
    "negative offset": external(offset="-8"),
    "no number": external(length="many"),
    "larger than any file": external(offset="9" * 400),
}


def check(folder: Path) -> None:
    names = [name for name in (MODEL_FILE, WEIGHTS_FILE) if (folder / name).exists()]
    load_checked_model(open_files(folder, names), MAIN_GRAPH)


@pytest.mark.parametrize("place", PLACES, ids=IDS)
def test_accepts_tensors_only_in_the_weights_file(
    place: Callable[[TensorProto], onnx.ModelProto], tmp_path: Path
) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(bytes(24))
    path = tmp_path / MODEL_FILE
    path.write_bytes(place(external()).SerializeToString())
    check(tmp_path)
    for tensor in AWAY.values():
        path.write_bytes(place(tensor).SerializeToString())
        with pytest.raises(lorac.ArtifactError, match="the weight 'w'"):
            check(tmp_path)


def test_rejects_a_location_that_is_given_twice(tmp_path: Path) -> None:
    """Readers may take the first or the last."""
    tensor = external()
    tensor.external_data.add(key="location", value="elsewhere")
    (tmp_path / WEIGHTS_FILE).write_bytes(bytes(24))
    (tmp_path / MODEL_FILE).write_bytes(initializer(tensor).SerializeToString())
    with pytest.raises(lorac.ArtifactError, match="elsewhere"):
        check(tmp_path)


def test_rejects_a_file_that_is_not_an_onnx_model(tmp_path: Path) -> None:
    (tmp_path / MODEL_FILE).write_bytes(b"\xff" * 100)
    with pytest.raises(lorac.ArtifactError, match="is not an ONNX model"):
        check(tmp_path)
