"""Products on rows: ops that move, ops that need the full shape, and unchanged outputs."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

import lorac
from examples.pipelines import tiny_vae
from lorac.backends.onnx.passes import verify_model
from lorac.backends.onnxruntime.flattening import CopyReshapeSizes, FlattenToRows
from lorac.testing import adapter_away, assert_close
from tests.emitted import load_emitted
from tests.zoo import ZOO

FEATURES, OUT, RANK = 4, 6, 2
DRAWN = np.random.default_rng(0)
WEIGHT, BIAS = DRAWN.standard_normal((FEATURES, OUT)), DRAWN.standard_normal(OUT)
HEAD = """<ir_version: 9, opset_import: ["" : 18]>
agraph (float[b, s, 4] x, float[4, r] a, float[r, 6] b) => ("""
SITE = """{ u = MatMul(x, a)
  y = MatMul(x, w)
  d = MatMul(u, b)
  z = Add(y, d)
"""


def emitted(body, output):
    """A site of rank r, x·w + (x·a)·b = z, and what follows it."""
    model = ir.from_onnx_text(HEAD + output + ") " + SITE + body + "}")
    for name, value in (("w", WEIGHT), ("bias", BIAS)):
        constant = ir.val(name, const_value=ir.tensor(value.astype(np.float32), name=name))
        for node in model.graph.all_nodes():
            for index, used in enumerate(node.inputs):
                if used is not None and used.name == name:
                    node.replace_input_with(index, constant)
        if constant.uses():
            model.graph.register_initializer(constant)
    return ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))


def answers(model, batch=2):
    inputs = {"x": (batch, 3, FEATURES), "a": (FEATURES, RANK), "b": (RANK, OUT)}
    drawn = np.random.default_rng(1)
    feeds = {name: drawn.standard_normal(shape).astype(np.float32) for name, shape in inputs.items()}
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def ops(model):
    return [node.op_type for node in model.graph]


FOLLOWED = {
    "nothing": ("", "float[b, s, 6] z", ["Reshape", "MatMul", "MatMul", "Gemm", "Shape", "Concat", "Reshape"]),
    "sums and scales": ("v = Add(z, bias) o = Mul(v, z)", "float[b, s, 6] o", None),
    "a norm": ("o = LayerNormalization <axis = 2> (z, bias)", "float[b, s, 6] o", None),
    "parts": (
        "p, q = Split <axis = 2, num_outputs = 2> (z) t = Tanh(p) o = Sub(t, q)",
        "float[b, s, 3] o",
        None,
    ),
    "heads": (
        "k = Constant <value_ints = [-1, 3, 2, 3]> () o = Reshape(z, k)",
        "float[n, 3, 2, 3] o",
        ["Reshape", "MatMul", "MatMul", "Gemm", "Constant", "Reshape"],
    ),
}
ACROSS = {
    "a sum of rows": ("o = ReduceSum(z)", "float[i, j, k] o"),
    "a dimension copied": ("k = Constant <value_ints = [0, 0, 2, 3]> () o = Reshape(z, k)", "float[b, s, 2, 3] o"),
    "positions": (
        "n = Constant <value_ints = [0]> () m = ReduceMax(z, n) o = Add(z, m)",
        "float[b, s, 6] o",
    ),
    "parts of the batch": (
        "k = Constant <value_ints = [1, 1]> () p, q = Split (z, k) o = Add(p, q)",
        "float[h, s, 6] o",
    ),
    "the other way round": ("t = Transpose <perm = [1, 0, 2]> (z) o = Add(t, t)", "float[s, b, 6] o"),
}


@pytest.mark.parametrize("followed", FOLLOWED)
@pytest.mark.parametrize("batch", [2, 0])
def test_moves_ops_that_act_on_rows(followed, batch):
    body, output, expected = FOLLOWED[followed]
    before = answers(emitted(body, output), batch)
    model = emitted(body, output)
    FlattenToRows().apply(model)
    for original, moved in zip(before, answers(model, batch), strict=True):
        assert moved.shape == original.shape
        assert_close(torch.from_numpy(moved), torch.from_numpy(original))
    assert "Gemm" in ops(model)
    assert [value.name for value in model.graph.outputs] == [output.split()[-1]]
    assert expected is None or sorted(ops(model)) == sorted(expected)
    assert ops(model).count("Reshape") == 2


@pytest.mark.parametrize("across", ACROSS)
def test_keeps_the_full_shape_for_ops_across_rows(across):
    body, output = ACROSS[across]
    before = answers(emitted(body, output))
    model = emitted(body, output)
    FlattenToRows().apply(model)
    for original, moved in zip(before, answers(model), strict=True):
        assert moved.shape == original.shape
        assert_close(torch.from_numpy(moved), torch.from_numpy(original))
    assert "Gemm" in ops(model)


def test_a_branch_within_sees_the_full_shape():
    body = """on = Constant <value = bool {1}> ()
      o = If (on) <then_branch = taken () => (float[b, s, 6] t) { t = Neg(z) },
                   else_branch = left () => (float[b, s, 6] e) { e = Identity(z) }>"""
    before = answers(emitted(body, "float[b, s, 6] o"))
    model = emitted(body, "float[b, s, 6] o")
    FlattenToRows().apply(model)
    assert_close(torch.from_numpy(answers(model)[0]), torch.from_numpy(before[0]))
    assert "Gemm" in ops(model)


def test_computes_a_size_before_the_reshape_that_reads_it():
    body, output = "i = Identity(z) o = ReduceSum(i)", "float[i, j, k] o"
    before = answers(emitted(body, output))
    model = emitted(body, output)
    (copied,) = [node for node in model.graph if node.op_type == "Identity"]
    copied.outputs[0].shape = None  # so the number of features is read from the matrix
    FlattenToRows().apply(model)
    assert ops(model)[-5:] == ["Identity", "Shape", "Concat", "Reshape", "ReduceSum"]
    verify_model(model, after=FlattenToRows.name)
    assert_close(torch.from_numpy(answers(model)[0]), torch.from_numpy(before[0]))


@torch.no_grad()
def test_heads_that_are_as_wide_as_tokens_are_joined_after_their_sizes_are_known():
    """Attention of one head, as in diffusers' autoencoders: its heads have the features of the tokens."""
    torch.manual_seed(0)
    x, model = torch.randn(2, 16, 4, 4), tiny_vae().decoder.mid_block.attentions[0]
    assert model.heads == 1
    lora = lorac.compile(model, {"a": lorac.LoRA(r=2)}).adapters["a"]
    for tensor in lora.parameters():
        tensor.normal_(std=0.5)
    found = lorac.compile(model, {"a": lora}, target="onnxruntime", example_inputs=(x,))(x)
    assert_close(found, lorac.compile(model, {"a": lora})(x))


def test_leaves_a_model_without_slots():
    model = ir.from_onnx_text(
        """<ir_version: 9, opset_import: ["" : 18]>
        agraph (float[b, s, 4] x) => (float[b, s, 6] z) <float[4, 6] w = {"""
        + ", ".join(["1"] * 24)
        + """}>
        { y = MatMul(x, w) z = Tanh(y) }"""
    )
    FlattenToRows().apply(model)
    assert ops(model) == ["MatMul", "Tanh"]


@pytest.mark.medium("test_moves_ops_that_act_on_rows, step by step, and the golden nodes")
@pytest.mark.slow("a ViT's pairs", keep=["tiny_vit"])
@pytest.mark.parametrize("name", ["tiny_albert", "tiny_t5", "tiny_vit"])  # a Llama's nodes are golden
@torch.no_grad()
def test_adds_every_pair_in_the_shape_of_its_product(name):
    """No value changes its shape between a pair and the sum with the base's product."""
    entry = ZOO[name]
    compiled = lorac.compile(
        entry.model(), {"a": lorac.LoRA(r=2, targets=entry.targets)}, target="onnxruntime", mode="live", self_test=False
    )
    graph = load_emitted(compiled).graph
    halves = [value for value in graph.inputs if str(value.name).endswith(":b")]
    assert len(halves) > 1
    products = [use.node for value in halves for use in value.uses()]
    assert {node.op_type for node in products} == {"MatMul"}
    assert {use.node.op_type for node in products for use in node.outputs[0].uses()} == {"Add"}


SHAPED = """<ir_version: 9, opset_import: ["" : 18]>
agraph (float[b, s, 6] x, float[s, b] other) => (float[OUT] y) {
  whole = Shape(x)
  first, second, last = Split <axis = 0, num_outputs = 3> (whole)
  two = Constant <value = int64[1] {2}> ()
  three = Constant <value = int64[1] {3}> ()
  shape = Concat <axis = 0> (PARTS)
  y = Reshape <allowzero = 1> (x, shape)
}"""


@pytest.mark.parametrize(
    ("parts", "out", "constant"),
    [
        ("first, second, two, three", "b, s, 2, 3", [0, 0, 2, 3]),
        ("first, two, three, second", "b, 2, 3, s", None),  # not at its own place
        ("second, first, last", "s, b, 6", None),
    ],
)
def test_reads_constant_sizes_from_the_inputs_axes(parts, out, constant):
    model = ir.from_onnx_text(SHAPED.replace("PARTS", parts).replace("OUT", out))
    before = ir.from_proto(ir.to_proto(model))
    CopyReshapeSizes().apply(model)
    (reshape,) = [node for node in model.graph if node.op_type == "Reshape"]
    value = ir.convenience.get_const_tensor(reshape.inputs[1])
    assert (None if value is None else value.numpy().tolist()) == constant
    assert ("Shape" in ops(model)) == (constant is None)
    feeds = {"x": np.arange(2 * 5 * 6, dtype=np.float32).reshape(2, 5, 6), "other": np.zeros((5, 2), np.float32)}
    found, expected = (
        ort.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
        for m in (model, before)
    )
    assert found[0].shape == expected[0].shape
    assert np.array_equal(found[0], expected[0])


class Positions(torch.nn.Module):
    """Runs a table of positions, in which the batch has no rows, through a layer of its own."""

    def __init__(self):
        super().__init__()
        self.place, self.up, self.down = torch.nn.Linear(2, 8), torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)
        self.register_buffer("table", torch.randn(5, 5, 2))

    def forward(self, x):
        places = torch.relu(self.place(self.table)).mean((0, 1))
        return self.down(torch.tanh(self.up(x) + places))


def test_a_table_is_not_cut_where_rows_have_adapters_of_their_own():
    x = torch.randn(4, 3, 4)
    variants = {
        "a": lorac.LoRA(r=2),
        "b": lorac.LoRA(r=3, targets=["up", "down"]),
        "c": lorac.LoRA(r=1, targets=["up"]),
    }
    host = Positions()
    adapters = [adapter_away(variant, host, x, name=name, seed=1) for name, variant in variants.items()]
    compiled = lorac.compile(host, adapters, target="onnxruntime", example_inputs={"x": x[:2]})
    for choices in (["b", "c", None, "b"], ["a", "b", "a", "c"]):
        together = compiled(x, adapters=choices)
        for row, choice in enumerate(choices):
            assert_close(together[row : row + 1], compiled(x[row : row + 1], adapters=choice))
