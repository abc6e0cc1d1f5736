"""Weights in 8 and 4 bits: the codec's codes of matrices, and the constants that it encodes."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from lorac.backends.onnx.quantised.base_weights import find_quantised, replace_quantised
from lorac.backends.onnx.quantised.codec import FLOAT32_LEVEL, Codec
from lorac.backends.onnx.quantised.products import PrequantisedMatrix, QuantiseWeights
from lorac.testing import assert_close

CODECS = [
    Codec(bits, block, symmetric)
    for bits, block, symmetric in [(4, 32, True), (4, 16, False), (4, 64, False), (8, 128, True), (8, 32, False)]
]
INT4 = Codec(4, 32, True)
ROWS, COLUMNS = 10, 72  # no multiple of any block but the smallest
X, IDS = np.random.default_rng(1).standard_normal((3, 5, COLUMNS), np.float32), np.array([[0, 9, 4], [4, 4, 1]])


def matrix(rows=ROWS, columns=COLUMNS, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(dtype)


def program(body, constants, inputs="float[b, s, 72] x, int64[i, j] ids", output="o", nested=""):
    """A model of some lines, whose constants are given by name."""
    text = f'<ir_version: 9, opset_import: ["" : 18]>\nagraph ({inputs}) => (float[n, m, k] {output}) {{ {body} }}'
    model = ir.from_onnx_text(text)
    for name, array in constants.items():
        value = next(v for n in model.graph.all_nodes() for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.dtype = ir.Shape(array.shape), value.const_value.dtype
        if value not in model.graph.inputs:
            model.graph.register_initializer(value)
    return model


def answer(model):
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"x": X, "ids": IDS}
    return torch.from_numpy(session.run(None, {i.name: given[i.name] for i in session.get_inputs()})[0])


def ops(model):
    return [node.op_type for node in model.graph.all_nodes()]


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_codes_are_within_half_a_step(codec):
    whole = matrix()
    encoded = codec.encode(whole)
    assert encoded.shape == whole.shape
    assert encoded.nbytes == sum(part.nbytes for part in encoded.parts().values()) == codec.count_bytes(whole.shape)
    again = codec.encode(whole.copy())
    assert all((part == again.parts()[name]).all() for name, part in encoded.parts().items())
    steps = np.repeat(np.abs(encoded.scales), codec.block, 1)[:, :COLUMNS]
    off = np.abs(encoded.decode() - whole)
    # The largest value of a block's other side may lie a whole step beyond the last number there is.
    assert (off <= steps * (1 if codec.symmetric else 0.5) * (1 + np.finfo(np.float32).eps * 8)).all()
    assert np.array_equal(encoded.rows(3, 4).decode(), encoded.decode()[3:7])


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_a_lookup_and_a_product_read_the_same_codes(codec):
    """A tied table of which a lookup and a product read one set of bytes."""
    table, body = matrix(), "e = Gather(w, ids) t = Transpose<perm = [1, 0]>(w) o = MatMul(e, t)"
    model = program(body, {"w": table})
    report = QuantiseWeights(codec, FLOAT32_LEVEL).apply(model).details
    if codec.block > COLUMNS:
        assert report.floats == {"w": f"rows shorter than a block of {codec.block}"}
        return
    come_to = report.quantised["w"].encoded.decode()
    assert_close(answer(model), torch.from_numpy(come_to[IDS] @ come_to.T))
    assert {"GatherBlockQuantized", "MatMulNBits"} <= set(ops(model))
    stored = [v for v in model.graph.initializers.values() if v.dtype is ir.DataType.UINT8]
    assert sorted(v.name for v in stored) == sorted(
        ["w_Q4" if codec.bits == 4 else "w_Q8", *([] if codec.symmetric else ["w_zero_points"])]
    )
    assert not any(v.const_value.size == table.size for v in model.graph.initializers.values())


READ = {
    "(in, out)": ("o = MatMul(x, w)", True, lambda w, c: X @ w),
    "(out, in)": ("t = Transpose<perm = [1, 0]>(w) o = MatMul(x, t)", False, lambda w, c: X @ w.T),
    "turned twice": (
        "t = Transpose<perm = [1, 0]>(w) u = Transpose<perm = [1, 0]>(t) o = MatMul(x, u)",
        True,
        lambda w, c: X @ w,
    ),
    "rows of ids": ("o = Gather(w, ids)", False, lambda w, c: w[IDS]),
    "in a branch": (
        """on = Constant <value = bool {1}> ()
           o = If (on) <then_branch = a () => (float[b, s, k] t) { t = MatMul(x, w) },
                        else_branch = z () => (float[b, s, k] e) { e = Identity(x) }>""",
        True,
        lambda w, c: X @ w,
    ),
    "with a bias": (
        """k = Constant <value_ints = [-1, 72]> () r = Reshape(x, k) g = Gemm<transB = 1>(r, w, c)
           n = Constant <value_ints = [3, 5, 10]> () o = Reshape(g, n)""",
        False,
        lambda w, c: X @ w.T + c,
    ),
    "with a sum": (
        """k = Constant <value_ints = [-1, 72]> () r = Reshape(x, k) h = MatMul(r, w) g = Gemm(r, w, h)
           n = Constant <value_ints = [3, 5, 10]> () o = Reshape(g, n)""",
        True,
        lambda w, c: 2 * (X @ w),
    ),
}


@pytest.mark.parametrize("how", READ)
def test_every_way_of_reading_a_matrix(how):
    body, by_columns, expected = READ[how]
    weight = matrix(COLUMNS, ROWS) if by_columns else matrix()
    constants = {"w": weight} | ({"c": matrix(1, ROWS)[0]} if ", c)" in body else {})
    model = program(body, constants)
    report = QuantiseWeights(INT4, FLOAT32_LEVEL).apply(model).details
    assert report.floats == {}
    encoded = report.quantised["w"].encoded
    assert encoded.shape == (ROWS, COLUMNS)
    come_to = encoded.decode().T if by_columns else encoded.decode()
    assert_close(answer(model), torch.from_numpy(expected(come_to, constants.get("c"))))
    assert not {"MatMul", "Gemm", "Gather", "Transpose"} & set(ops(model))
    assert "w" not in model.graph.initializers


STAYS = {
    "short rows": ("o = MatMul(x, w)", matrix(12, 16), "rows shorter than a block of 32"),
    "no product": ("o = Add(x, w)", matrix(), "read by Add"),
    "a product and another op": ("h = MatMul(x, w) s = ReduceSum(w) o = Add(h, s)", matrix(72), "read by ReduceSum"),
    "from the left": ("o = MatMul(w, x)", matrix(), "read by MatMul"),
    "both axes": (
        "t = Transpose<perm = [1, 0]>(w) a = MatMul(x, w) b = MatMul(x, t) o = Add(a, b)",
        matrix(72),
        "read along both axes",
    ),
    "a stack": ("o = MatMul(x, w)", np.ones((3, 72, 4), np.float32), "of 3 axes"),
    "float64": ("y = Cast<to = 11>(x) h = MatMul(y, w) o = Cast<to = 1>(h)", matrix(72, 4, 0, float), "of double"),
    "a scaled product": (
        """k = Constant <value_ints = [-1, 72]> () r = Reshape(x, k) o = Gemm<alpha = 2.0>(r, w)""",
        matrix(72),
        "read by Gemm",
    ),
}


@pytest.mark.parametrize("why", STAYS)
def test_leaves_weights_that_no_op_supports(why):
    body, weight, reason = STAYS[why]
    model = program(body, {"w": weight})
    before = ops(model)
    outcome = QuantiseWeights(INT4, FLOAT32_LEVEL).apply(model)
    report = outcome.details
    assert not report.quantised
    assert report.floats["w"].startswith(reason)
    assert ops(model) == before
    assert list(outcome.notes) == [f"weights that stay as they are, {report.floats['w']}: w"]


def test_leaves_slots_and_vectors():
    model = program(
        "h = MatMul(x, w) o = Mul(h, v)", {"w": matrix(72), "v": matrix(1, 72)[0]}, "float[b, s, 72] x, float[72, 72] w"
    )
    report = QuantiseWeights(INT4, FLOAT32_LEVEL).apply(model).details
    assert not report.quantised
    assert not report.floats


def test_of_mixed_weights_the_first_and_last_have_eight_bits():
    """As many as there is room for, in the order of the program: its largest matrix stays in four."""
    tables = {name: matrix(72, seed=seed) for seed, name in enumerate("edcba")} | {"z": matrix(220, seed=9)}
    lines = " ".join(
        f"{out} = MatMul({read}, {name})" for read, name, out in zip("xpqrst", "abcdez", "pqrsto", strict=True)
    )
    model = program(lines, {name: table.T.copy() for name, table in tables.items()})
    report = QuantiseWeights(INT4, FLOAT32_LEVEL, mixed=True).apply(model).details
    bits = {name: one.encoded.codec.bits for name, one in report.quantised.items()}
    assert bits == {"a": 8, "b": 4, "c": 4, "d": 4, "e": 4, "z": 4}
    wanted = X
    for name in "abcdez":
        wanted = wanted @ report.quantised[name].encoded.decode().T
    assert_close(answer(model), torch.from_numpy(wanted))


def test_the_codes_of_a_quantised_model_stay_where_others_are_mixed():
    given = INT4.encode(matrix(8, seed=1))
    model = program(
        "a = MatMul(x, p) b = MatMul(x, l) o = Concat<axis = -1>(a, b)",
        {"p": given.decode().T.copy(), "l": matrix(120, seed=2).T.copy()},
    )
    passed = QuantiseWeights(INT4, FLOAT32_LEVEL, [PrequantisedMatrix(given.decode(), given)], mixed=True)
    assert passed.apply(model).details.quantised["p"].encoded is given


def test_a_table_of_several_graphs_has_one_form():
    """An encoder looks rows up in the table that is tied to the decoder's output layer, whose codec is another."""
    table = {"t": matrix()}
    decoder = program("g = Gather(t, ids) w = Transpose<perm = [1, 0]>(t) o = MatMul(g, w)", table)
    encoder = program("o = Gather(t, ids)", table)
    passed = QuantiseWeights(INT4, FLOAT32_LEVEL, head=Codec(8, 32, True))
    reports = {name: passed.apply(model).details for name, model in (("main", decoder), ("encoder", encoder))}
    codecs = [report.quantised["t"].encoded.codec for report in reports.values()]
    assert codecs == [Codec(8, 32, True)] * 2
    computed = replace_quantised(reports, {"t": torch.from_numpy(matrix())})["t"]
    assert_close(answer(encoder), computed[torch.from_numpy(IDS)])
    alone = QuantiseWeights(INT4, FLOAT32_LEVEL, head=Codec(8, 32, True)).apply(program("o = Gather(t, ids)", table))
    assert alone.details.quantised["t"].encoded.codec == INT4


def test_pieces_of_joined_matrices_are_found_again():
    """What a program joined, transposed or shares is known by its values; what it does not hold is not."""
    one, two = matrix(6, seed=1), matrix(9, seed=2)
    model = program("o = MatMul(x, w)", {"w": np.concatenate([one, two]).T.copy()})
    report = QuantiseWeights(INT4, FLOAT32_LEVEL).apply(model).details
    tensors = {
        "one": torch.from_numpy(one),
        "two": torch.from_numpy(two).t(),
        "tied": torch.from_numpy(one),
        "other": torch.from_numpy(matrix(6, seed=3)),
        "vector": torch.from_numpy(one[0]),
    }
    pieces = find_quantised({"main": report}, tensors)
    assert pieces.keys() == {"one", "two", "tied"}
    assert (pieces["one"].transposed, pieces["two"].transposed) == (False, True)
    computed = replace_quantised({"main": report}, tensors)
    assert torch.equal(computed["one"], torch.from_numpy(INT4.encode(one).decode()))
    assert torch.equal(computed["two"], torch.from_numpy(INT4.encode(two).decode()).t())
    assert computed["other"] is tensors["other"]
    assert computed["tied"] is computed["one"]
