"""Programs from strangers: the ops they may call, the names they may use and the memory they may ask for."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import lorac
from lorac.backends.eager.stored_program import StoredProgramEngine
from lorac.storage import artifact, program
from lorac.storage.op_names import find_op, op_name
from lorac.storage.program import StoredProgram, nodes_from_json
from tests.limits import within_budget
from tests.refusing import refuses
from tests.zoo import ZOO

X_VALUE = torch.ones(2, 4)
X = {"input": "x", "shape": [2, 3], "dtype": "float32", "dynamic": []}


def _call(op: str, *args: Any, name: str = "y", **kwargs: Any) -> dict[str, Any]:
    return {"name": name, "op": op, "args": list(args), "kwargs": kwargs}


def _stored(*nodes: dict[str, Any]) -> StoredProgram:
    last = [node["name"] for node in nodes][-1]
    return StoredProgram({"nodes": [X, *nodes, {"output": [{"node": last}]}]}, {})


def test_a_program_of_functional_ops_runs() -> None:
    doubled = _stored(_call("aten.mul.Tensor", {"node": "x"}, 2.0))
    assert torch.equal(doubled(x=torch.ones(2, 3))[0], torch.full((2, 3), 2.0))


REFUSED = """
    aten.segment_reduce.default aten.mul_.Tensor aten.resize_.default aten.empty.memory_format aten.new_empty.default
    aten.empty_strided.default aten.set_.source_Tensor aten.add.out aten.embedding_dense_backward.default
    aten.max_unpool2d.default aten._unsafe_index.Tensor aten.fbgemm_linear_int8_weight.default
    aten.mkldnn_rnn_layer.default aten._sparse_csr_tensor_unsafe.default aten.from_file.default aten._print.default
    aten.bincount.default prims.empty_strided.default
"""


@pytest.mark.parametrize("op", REFUSED.split())
def test_ops_that_a_program_may_not_name(op: str) -> None:
    with pytest.raises(lorac.ArtifactError, match="', an op that "):
        nodes_from_json([X, _call(op, {"node": "x"})])


def test_every_op_that_a_program_may_name_is_functional() -> None:
    """As torch registers them: nothing is written to, and nothing has an unsafe form."""
    allowed = set()
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = full.partition("::")
        packet, _, overload = rest.partition(".")
        found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload or "default", None)
        if isinstance(found, torch._ops.OpOverload) and namespace in {"aten", "prims"} and op_name(found):
            assert not found._schema.is_mutable
            assert not {"unsafe", "filename", "out"} & {argument.name for argument in found._schema.arguments}, full
            assert not any(argument.alias_info and argument.alias_info.is_write for argument in found._schema.returns)
            allowed.add(packet)
    assert {"add", "silu", "linear", "scaled_dot_product_attention", "index_put", "lstm"} <= allowed
    assert not any(name.endswith("_") and not name.endswith("__") for name in allowed)


CODE = "x=__import__('pathlib').Path('written').touch()"


@pytest.mark.parametrize(
    "nodes",
    [
        [{**X, "input": CODE}],
        [X, _call("aten.mul.Tensor", {"node": "x"}, 2.0, name=CODE)],
        [X, _call("aten.gelu.default", {"node": "x"}, **{f"approximate='none', {CODE}, y": 1})],
        [{**X, "input": "lambda"}],
        [{**X, "input": 3}],
    ],
    ids=["input", "node", "keyword", "reserved", "number"],
)
def test_rejects_names_that_are_not_identifiers(
    nodes: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.fx generates code from a graph, and runs it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lorac.ArtifactError, match="not an identifier of Python"):
        fx.GraphModule(nn.Module(), nodes_from_json(nodes)[0])
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    "node",
    [
        _call("aten.zeros.default", [1 << 20, 1 << 20]),
        _call("aten.arange.default", 1 << 40),
        _call("aten.expand.default", {"node": "x"}, [1 << 40, 2, 3]),
        _call("aten.repeat_interleave.self_int", {"node": "x"}, 1 << 40),
        _call("aten.one_hot.default", {"node": "x"}, 1 << 40),
    ],
    ids=lambda node: node["op"],
)
def test_sizes_are_bounded(node: dict[str, Any]) -> None:
    with within_budget(), pytest.raises(lorac.ArtifactError, match="far too large"):
        _stored(node)
    with pytest.raises(lorac.FormatError, match="the example of an input"):
        StoredProgram({"nodes": [{**X, "shape": [1 << 40]}, {"output": []}]}, {})


@pytest.mark.parametrize(
    "calls",
    [
        [_call("operator.pow", 2, 10**9)],
        [_call("operator.mul", [0], 10**9)],
        [_call("operator.mul", "a", 10**9)],
        [
            _call("operator.mul", 2**40, 2**20, name="n0"),
            *(_call("operator.mul", {"node": f"n{i}"}, {"node": f"n{i}"}, name=f"n{i + 1}") for i in range(40)),
        ],
    ],
    ids=["power", "list", "text", "squares"],
)
def test_numbers_are_bounded(calls: list[dict[str, Any]]) -> None:
    """They are computed when the program is called; fx must not write the operator itself into its code."""
    stored = _stored(*calls)
    with within_budget(), pytest.raises(lorac.ArtifactError, match="not sizes"):
        stored(x=torch.ones(2, 3))


def _doubled(first: str, times: int) -> list[dict[str, Any]]:
    """Return calls that double a result so many times, each modest by itself."""
    names = [first, *(f"d{i}" for i in range(times))]
    return [
        _call("aten.cat.default", [{"node": one}, {"node": one}], name=two) for one, two in itertools.pairwise(names)
    ]


@pytest.mark.parametrize("ops", [[], ["nonzero"]], ids=["static", "of values"])
def test_results_together_are_bounded(ops: list[str]) -> None:
    last, calls = "x", list[dict[str, Any]]()
    for op in ops:
        calls.append(_call(f"aten.{op}.default", {"node": last}, name=op))
        last = op
    x = torch.ones(2, 3)
    with refuses("input_mismatch", match="more than"), lorac.budget(bytes=1 << 24):
        _stored(*calls, *_doubled(last, 30)).call_bounded({"x": x})
    short = _stored(*calls, *_doubled(last, 3))
    with lorac.budget(bytes=1 << 24):
        for _ in range(2):
            assert torch.equal(short.call_bounded({"x": x})[0], short(x=x)[0])


def test_rejects_a_program_that_needs_more_memory_than_the_machine_has() -> None:
    with refuses("input_mismatch", match="more than"):
        _stored(*_doubled("x", 44)).call_bounded({"x": torch.ones(2, 3)})


@pytest.mark.medium("the bounds of single programs")
def test_measures_a_program_once_per_shape(tmp_path: Path) -> None:
    llama = ZOO["tiny_llama"]
    lorac.compile(llama.model(), {"a": lorac.LoRA(r=2, targets=["q_proj"])}).save(tmp_path / "saved")
    loaded = lorac.load(tmp_path / "saved")
    assert isinstance(loaded.engine, StoredProgramEngine)
    for rows in (1, 2, 2):
        loaded(**llama.inputs(batch=rows))
    peaks = loaded.engine.graphs["main"].program.bounded.peaks
    assert len(peaks) == 2 and None not in peaks.values()


COUNTS = torch.tensor([1 << 40, 1])


@pytest.mark.parametrize(
    ("op", "operands"),
    [("repeat_interleave.Tensor", []), ("repeat_interleave.self_Tensor", [{"node": "x"}]), ("one_hot.default", [])],
)
def test_bounds_data_dependent_sizes(op: str, operands: list[Any]) -> None:
    call = _call(f"aten.{op}", {"node": "x"}, *operands)
    with refuses("input_mismatch", match="more than"):
        _stored(call).call_bounded({"x": COUNTS})
    few = torch.tensor([2, 1])
    assert torch.equal(_stored(call).call_bounded({"x": few})[0], _stored(call)(x=few)[0])


def test_does_not_count_freed_tensors() -> None:
    names = [f"y{i}" for i in range(64)]
    calls = [_call("aten.add.Tensor", {"node": one}, 1.0, name=two) for one, two in itertools.pairwise(["x", *names])]
    x = torch.ones(256, 1024)
    with lorac.budget(bytes=3 << 20):
        assert torch.equal(_stored(*calls).call_bounded({"x": x})[0], x + 64)


def test_the_number_of_nodes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "MOST_NODES", 100)
    with pytest.raises(lorac.ArtifactError, match="has 101 nodes, more than 100"):
        nodes_from_json([X] * 101)


def test_a_failing_op_raises_a_typed_error(tmp_path: Path) -> None:
    compiled = lorac.compile(nn.Sequential(nn.Linear(4, 3)), {"a": lorac.LoRA(targets=["0"])}, "eager", (X_VALUE,))
    compiled.save(tmp_path / "a")
    path = tmp_path / "a" / "program.json"
    stored = json.loads(path.read_text())
    call = next(node for node in stored["main"]["nodes"] if "op" in node)
    call |= {"op": "aten.bmm.default", "args": [{"node": "input"}] * 2}
    path.write_text(json.dumps(stored))
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    files = {
        name: entry for name, entry in artifact.describe_files(tmp_path / "a").items() if name in manifest["files"]
    }
    sealed = artifact.seal_manifest({**manifest, "files": files})
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(sealed))
    loaded = lorac.load(tmp_path / "a")
    with pytest.raises(lorac.InputMismatch, match="cannot compute with these inputs"):
        loaded(X_VALUE)


def test_stores_in_place_ops_functionally(tmp_path: Path) -> None:
    """As a ResNet writes into its activations, behind norms whose statistics are the program's."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 3)).eval()
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=["0", "3"])}, "eager", (X_VALUE,))
    compiled.save(tmp_path / "a")
    assert "relu_" not in (tmp_path / "a" / "program.json").read_text()
    inputs = _normal(5, 4)
    assert torch.equal(lorac.load(tmp_path / "a")(inputs), compiled(inputs))


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


WAVES = _normal(3, 4).to(torch.complex64)
LEAST = torch.tensor([5, -(1 << 63)])
LSTM = (False, 1, 0.0, False, False, True)
CELLS = [torch.zeros(1, 2, 16)] * 2


@pytest.mark.parametrize(
    ("op", "sound", "wrong"),
    [
        (
            "aten.scaled_dot_product_attention.default",
            (_normal(1, 2, 3, 8), _normal(1, 2, 5, 8), _normal(1, 2, 5, 8)),
            (_normal(1, 2, 3, 8), _normal(1, 2, 5, 8), _normal(1, 2, 1, 8)),
        ),
        (
            "aten.embedding_bag.default",
            (_normal(5, 8), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 2, 2, 4])),
            (_normal(5, 8), torch.tensor([0, 1, 2, 3]), torch.tensor([0, -(10**9), 2])),
        ),
        ("aten._weight_norm.default", (_normal(5, 4), _normal(5, 1)), (_normal(5, 4), _normal(1, 1))),
        (
            "aten.lstm.input",
            (_normal(2, 5, 8), CELLS, [_normal(64, 8), _normal(64, 16)], *LSTM),
            (_normal(2, 5, 8), CELLS, [_normal(1, 1), _normal(64, 16)], *LSTM),
        ),
        ("aten._fft_r2c.default", (_normal(3, 4), [1], 0, True), (_normal(3, 4), [60_000_000], 0, True)),
        ("aten._fft_c2c.default", (WAVES, [0, 1], 0, True), (WAVES, [2, 2**31 - 1], 0, False)),
        ("aten._fft_c2r.default", (WAVES, [1], 0, 6), (WAVES, [1], 0, 600)),
        (
            "aten._native_batch_norm_legit.no_stats",
            (_normal(3, 8), None, None, True, 0.1, 1e-5),
            (_normal(3, 8), None, None, False, 0.1, 1e-5),
        ),
        ("aten.floor_divide.default", (LEAST[:1], torch.tensor(3)), (LEAST, torch.tensor(-1))),
        ("aten.lcm.default", (LEAST[:1], torch.tensor(3)), (LEAST, torch.tensor(-1))),
        ("aten.repeat_interleave.Tensor", (torch.tensor([2, 1]),), (torch.tensor([2**63 - 1, 2**63 - 1, 5]),)),
        (
            "aten.col2im.default",
            (_normal(1, 8, 16), [5, 5], [2, 2], [1, 1], [0, 0], [1, 1]),
            (_normal(1, 8, 16), [5, 5], [2, 2], [1, 1], [2**31, 0], [1, 1]),
        ),
        (
            "aten.embedding_bag.padding_idx",
            (_normal(5, 8), torch.tensor([0, 1, 2]), torch.tensor([0, 3]), False, 1, False, None, True, -1),
            (_normal(5, 8), torch.tensor([0, 1, 2]), torch.tensor([0]), False, 1, False, None, True, -1),
        ),
        ("aten._weight_norm.default", (_normal(5, 4), _normal(5, 1)), (_normal(0), _normal(3, 0))),
        (
            "aten.replication_pad2d.default",
            (_normal(1, 2, 4, 4), [1, 1, 3, 0]),
            (_normal(1, 2, 4, 4), [2**63 - 1, 2**63 - 1, 3, 0]),
        ),
        ("aten._adaptive_avg_pool2d.default", (_normal(2, 3, 3), [2, 2]), (_normal(2, 3, 3), [2**31, 0])),
        ("aten._adaptive_avg_pool3d.default", (_normal(2, 4, 3, 3), [2, 1, 2]), (_normal(2, 4, 3, 3), [2**31, 2, 0])),
        ("aten._pdist_forward.default", (_normal(3, 4), 2.0), (_normal(4, 8, 0, 4), 2.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_kernels_that_believe_their_operands_are_guarded(op: str, sound: Any, wrong: Any) -> None:
    guarded = find_op(op)
    expected, found = getattr(guarded, "op")(*sound), guarded(*sound)  # noqa: B009  # it is typed as a function
    assert all(map(torch.equal, expected, found) if isinstance(found, tuple) else [torch.equal(expected, found)])
    with pytest.raises(lorac.ArtifactError, match="operands that do not fit together"):
        guarded(*wrong)


def test_guards_operands_that_are_given_by_name() -> None:
    named = {"aten._fft_r2c.default": (_normal(3, 4), {"dim": [7], "normalization": 0, "onesided": True})}
    named["aten.div.Scalar_mode"] = (LEAST, {"other": -1, "rounding_mode": "trunc"})
    for op, (x, by_name) in named.items():
        with pytest.raises(lorac.ArtifactError, match="operands that do not fit together"):
            find_op(op)(x, **by_name)


def test_numbers_are_not_tensors() -> None:
    with pytest.raises(lorac.ArtifactError, match="calls 'floordiv' on arguments that are not sizes"):
        _stored(_call("operator.floordiv", {"node": "x"}, -1))(x=LEAST)


def test_rejects_shapes_that_do_not_fit_before_anything_is_computed() -> None:
    drawn = _call("aten.rand.default", [3, 5], name="drawn")
    stored = _stored(drawn, _call("aten.mm.default", {"node": "x"}, {"node": "drawn"}))
    before = torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="3"):
        stored.call_bounded({"x": torch.ones(2, 4)})
    assert torch.equal(torch.random.get_rng_state(), before)
    assert stored.call_bounded({"x": torch.ones(2, 3)})[0].shape == (2, 5)


SQUARES = (
    _call("aten.ones.default", [6000, 6000], name="m0"),
    *(_call("aten.mm.default", {"node": f"m{i}"}, {"node": f"m{i}"}, name=f"m{i + 1}") for i in range(12)),
)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "calls",
    [
        SQUARES,
        (
            _call("aten.expand.default", {"node": "x"}, [7_000_000, 3, 3], name="e"),
            *(_call("aten.sum.default", {"node": "e"}, name=f"s{i}") for i in range(5000)),
        ),
        (_call("aten.nonzero.default", {"node": "x"}, name="rows"), *SQUARES),
        (_call("aten.matmul.default", {"node": "x"}, {"node": "x"}, name="y"), *SQUARES),
    ],
    ids=["products", "sums of views", "of values", "of other shapes"],
)
def test_bounds_the_operations_of_a_call(calls: tuple[dict[str, Any], ...], mode: Any) -> None:
    with within_budget(), mode(), refuses("input_mismatch", match="operations, more than"):
        _stored(*calls).call_bounded({"x": torch.ones(3, 3)})


def test_the_caller_sets_the_limit_of_operations() -> None:
    stored = _stored(_call("aten.mm.default", {"node": "x"}, {"node": "x"}))
    x = _normal(256, 256)
    for _ in range(2):
        with lorac.budget(operations=1e6), refuses("input_mismatch", match="3.4e.07 operations, more than 1.0e.06"):
            stored.call_bounded({"x": x})
        assert torch.equal(stored.call_bounded({"x": x})[0], x @ x)


def test_rejects_layers_without_parameters_at_once() -> None:
    states = [{"node": "h"}, {"node": "h"}]
    layers = _call("aten.lstm.input", {"node": "x"}, states, [], False, 60_000_000, 0.0, False, False, False)
    stored = _stored(_call("aten.zeros.default", [1, 3, 4], name="h"), layers)
    with within_budget(), pytest.raises(lorac.ArtifactError, match="operands that do not fit together"):
        stored.call_bounded({"x": torch.ones(5, 3, 4)})


def test_further_ops_need_trust(tmp_path: Path) -> None:
    class Polynomial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.laguerre_polynomial_l(self.layer(x), 3)

    compiled = lorac.compile(Polynomial(), {"a": lorac.LoRA(r=2, targets=["layer"])}, "eager", (X_VALUE,))
    compiled.save(tmp_path / "a")
    with refuses(
        "artifact_error",
        match=r"laguerre.*from an artifact that you trust(?s:.)*give trust=True if .* or trust its maker$",
    ):
        lorac.load(tmp_path / "a")
    assert torch.equal(lorac.load(tmp_path / "a", trust=True)(X_VALUE), compiled(X_VALUE))
