"""The op of lorac-native against ONNX Runtime's own ops and against sums in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from lorac.backends.onnxruntime.native_op import DOMAIN, OP, use_native_op
from lorac.native_library import OP_VERSION
from tests.limits import NATIVE, NATIVE_HALF
from tests.native.graphs import RESIDUAL, Case, own_ops
from tests.native.library import needs_compiler

pytestmark = needs_compiler
Array = np.ndarray
THREADS = (1, 2, 4)


CASES = (
    Case(1, 1, 576, (16, 16, 16), (576, 192, 192)),
    Case(2, 3, 64, (3, 5), (7, 33)),
    Case(8, 4, 130, (16, 1), (96, 31)),
    Case(1, 70, 600, (17,), (100,)),
    Case(3, 1, 17, (1,), (1,)),
    Case(1, 5, 2048, (256,), (40,)),
    Case(1, 2, 33, (0, 8), (65, 64)),
    Case(33, 1, 45, (13,), (301,)),
    *(Case(2, 3, 50, (9, 20), (70, 33), scales) for scales in ("g", "h", "c", "ghc")),
    *(Case(places, 3, 50, (9,), (70,), scales) for places, scales in ((2, "ghcr"), (30, "r"))),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_onnx_ops_for_every_number_of_threads(native: Path, case: Case) -> None:
    feeds = make_feeds(case)
    each = [session(case, native, threads).run(None, feeds) for threads in THREADS]
    assert all(np.array_equal(one, other) for more in each[1:] for one, other in zip(each[0], more, strict=True))
    emitted = session(case, None, 1).run(None, feeds)
    for found, other, added in zip(each[0], emitted, added_by(case, feeds), strict=True):
        assert np.linalg.norm(found - other) <= NATIVE * np.linalg.norm(added)


def test_factors_in_float16_round_alone(native: Path) -> None:
    case = CASES[0]
    feeds = make_feeds(case)
    narrow = {name: array.astype(np.float16) if ":" in name else array for name, array in feeds.items()}
    wide = {name: array.astype(np.float32) for name, array in narrow.items()}
    found = session(case, native, 1, TensorProto.FLOAT16).run(None, narrow)
    same = session(case, native, 1).run(None, wide)
    for one, other, exact, added in zip(
        found, same, session(case, native, 1).run(None, feeds), added_by(case, feeds), strict=True
    ):
        assert np.linalg.norm(one - other) <= NATIVE * np.linalg.norm(added)
        assert np.linalg.norm(one - exact) <= NATIVE_HALF * np.linalg.norm(added)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("0:b", (1, 15, 576)), ("1:b", (1, 15, 192)), ("2:a", (2, 576, 16)), ("base", (1, 2, 960))],
)
def test_rejects_other_shapes(native: Path, name: str, shape: tuple[int, ...]) -> None:
    feeds = {**make_feeds(CASES[0]), name: np.zeros(shape, np.float32)}
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="AddLowRank"):
        session(CASES[0], native, 1).run(None, feeds)


def uneven_session(package: Path) -> ort.InferenceSession:
    """The op for one layer of 9 features in and 5 out, and rows that brought different numbers of tokens."""
    kinds = {"x": ["t", 9], "base": ["t", 5], "0:a": ["places", 9, 3], "0:b": ["places", 3, 5], "counts": ["rows"]}
    types = {"counts": TensorProto.INT32}
    node = helper.make_node(OP, list(kinds), ["y"], domain=DOMAIN, widths=[5], parts=[1])
    inputs = [helper.make_tensor_value_info(n, types.get(n, TensorProto.FLOAT), shape) for n, shape in kinds.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", 5])]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, OP_VERSION)]
    model = helper.make_model(helper.make_graph([node], "layer", inputs, outputs), opset_imports=opsets, ir_version=10)
    return open_session(model, package)


def uneven_feeds(counts: list[int], places: int) -> dict[str, Array]:
    random, tokens = np.random.default_rng(0), sum(counts)
    shapes = {"x": (tokens, 9), "base": (tokens, 5), "0:a": (places, 9, 3), "0:b": (places, 3, 5)}
    drawn = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**drawn, "counts": np.array(counts, np.int32)}


@pytest.mark.parametrize("counts", [[1, 20, 0, 3], [0, 0, 0, 1], [2, 2, 2, 2]], ids=str)
@pytest.mark.parametrize("places", [1, 2, 4])
def test_rows_may_bring_different_numbers_of_tokens(native: Path, counts: list[int], places: int) -> None:
    feeds = uneven_feeds(counts, places)
    (found,) = uneven_session(native).run(None, feeds)
    of_row = np.repeat(np.arange(len(counts)) // (len(counts) // places), counts)
    x = feeds["x"].astype(np.float64)
    added = np.einsum("tk,tkr,trn->tn", x, feeds["0:a"][of_row], feeds["0:b"][of_row], optimize=True)
    assert np.linalg.norm(found - feeds["base"] - added) <= NATIVE * np.linalg.norm(added)


@pytest.mark.parametrize("counts", [[3, 3, 3, 3], [4, 4, 4], [9, -1, 0, 0]], ids=str)
def test_rejects_other_numbers_of_tokens(native: Path, counts: list[int]) -> None:
    feeds = {**uneven_feeds([2, 2, 2, 2], 2), "counts": np.array(counts, np.int32)}
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="AddLowRank"):
        uneven_session(native).run(None, feeds)


def test_one_output_of_all_layers_holds_theirs_side_by_side(native: Path) -> None:
    case = CASES[1]
    feeds, model = make_feeds(case), own_ops(case)
    use_native_op(model)
    each = open_session(model, native).run(None, feeds)
    del model.graph.node[0].output[1:], model.graph.output[1:]
    model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value = sum(case.widths)
    (joined,) = open_session(model, native).run(None, feeds)
    assert np.array_equal(joined, np.concatenate(each, axis=-1))


def open_session(model: onnx.ModelProto, package: Path) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.register_custom_ops_library(str(package / "lorac_native" / "liblorac_native.so"))
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def make_feeds(case: Case) -> dict[str, Array]:
    random = np.random.default_rng(0)

    def noise(*shape: int, scale: float = 1) -> Array:
        return (scale * random.standard_normal(shape)).astype(np.float32)

    feeds = {
        "x": noise(case.places, case.segment, case.features),
        "base": noise(case.places, case.segment, sum(case.widths), scale=3),
    }
    for i, (rank, width) in enumerate(zip(case.ranks, case.widths, strict=True)):
        feeds[f"{i}:a"] = noise(case.places, case.features, rank, scale=case.features**-0.5)
        feeds[f"{i}:b"] = noise(case.places, rank, width, scale=max(rank, 1) ** -0.5)
        roles = case.scales.replace(RESIDUAL, "")
        feeds |= {f"{i}:{role}": noise(case.places, 1, rank if role == "g" else width) for role in roles}
        if RESIDUAL in case.scales:
            feeds[f"residual{i}"] = noise(case.places, case.segment, width, scale=3)
    return feeds


def added_by(case: Case, feeds: dict[str, Array]) -> list[Array]:
    """What each pair adds, in float64."""
    x, one = feeds["x"].astype(np.float64), np.ones(1)
    return [
        feeds.get(f"{i}:h", one) * (x @ feeds[f"{i}:a"] * feeds.get(f"{i}:g", one) @ feeds[f"{i}:b"])
        for i in range(len(case.ranks))
    ]


def session(case: Case, package: Path | None, threads: int, factors: int = TensorProto.FLOAT) -> ort.InferenceSession:
    """A session of ONNX Runtime's own ops, or, with the package, of its op."""
    model = own_ops(case)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.log_severity_level = 3
    if package is not None:
        assert use_native_op(model, half=factors == TensorProto.FLOAT16) == len(case.widths)
        assert [node.op_type for node in model.graph.node] == [OP]
        settings.register_custom_ops_library(str(package / "lorac_native" / "liblorac_native.so"))
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
