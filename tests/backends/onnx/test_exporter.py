"""Programs are written as torch's exporter writes them, for the calling thread alone."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor

import onnx_ir as ir
import pytest
import torch
from onnxscript import opset18
from torch import nn
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

import lorac
from lorac.backends.onnx.export import exporter, torchlib, type_promotion
from lorac.backends.onnx.export.opsets import op
from lorac.backends.onnx.export.translations import TRANSLATIONS
from lorac.testing import assert_close
from tests.emitted import load_emitted
from tests.refusing import refuses


class Host(nn.Module):
    """A linear layer, and a step after it."""

    def __init__(self, step):
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.step = step

    def forward(self, x):
        return self.step(self, x, self.up(x))


def masked(host, x, y):
    wanted = (y > 0) & (x > 0) | (x < -1)
    return torch.where(wanted, y.min(x), y.max(x))


def cast(host, x, y):
    return host.down((y.to(torch.float64) * 2).to(x).to(torch.float32)).to(torch.float32)


def promoted(host, x, y):
    """Operands of three dtypes, which torch casts as it computes and ONNX does not."""
    counted = (y > 0) * 3 + torch.arange(6)
    return host.down(y * counted) + counted / 4


def cut_in_one(host, x, y):
    """A split into one part."""
    return host.down(y.split([6], -1)[0])


def numbered(host, x, y):
    """``item()``, and a meshgrid whose size follows from it."""
    count = (x > 0).sum().item()
    rows, _ = torch.meshgrid(torch.arange(count), torch.arange(2), indexing="ij")
    return host.down(y) * count + rows.sum()


def pooled(host, x, y):
    return host.down(y) * nn.functional.adaptive_avg_pool2d((y @ x.t())[None], (1, 1))[0]


def pooled_along_one_axis(host, x, y):
    """Of a transposed tensor torch's decomposition sets the strides in place."""
    thirds = nn.functional.adaptive_avg_pool1d(y, 3).repeat_interleave(2, 1)
    return host.down(y) * nn.functional.adaptive_avg_pool1d(y[None].transpose(1, 2), 1)[..., 0] + thirds


def viewed_as_it_was(host, x, y):
    return host.down(y.view(y.shape).reshape(-1, 6))


def scores_in_place(host, x, y):
    scores = torch.matmul(y, x.transpose(-1, -2))
    scores += 1.5
    scores += torch.ones(1)
    return host.down(y) + scores.sum()


def dropped_in_place(host, x, y):
    """Outside training dropout returns its operand, which is read once more."""
    dropped = host.drop(y)
    dropped += 1.5
    return host.down(y) + dropped


def viewed_in_place(host, x, y):
    y[:, 0] += 1.5
    return host.down(y)


def seen_through_a_view(host, x, y):
    doubled = y * 2
    first = doubled[0]
    doubled += 1.5
    return host.down(doubled) + first


def of_another_dtype(host, x, y):
    scaled = (y * 3).to(torch.int64) * 1
    scaled += scaled.new_ones(1)
    wide = y * 2
    wide += scaled
    return wide


def taken_from_numbers(host, x, y):
    mask = (y > 0).to(torch.int64)
    return host.down(y) * (1.0 - mask) + torch.rsub(y, x, alpha=2) + (3 - mask)


def divided_by_next_to_nothing(host, x, y):
    """What keeps a quotient from being 0 / 0 is no 0."""
    nothing = torch.relu(y) * 0
    return host.down(y) + nothing / (nothing + 1e-15)


def squeezed_where_it_is_not_one(host, x, y):
    """A squeeze leaves alone what is of another size, and may so be no step at all."""
    wide = host.down(y)[None, :, None].squeeze(dim=(1, 2)).squeeze(-1)
    return wide.squeeze(0).squeeze(0).squeeze(1)


def normed(host, x, y):
    """With a scale and without, over one axis and over two."""
    scaled = nn.functional.rms_norm(host.down(y), (6,), torch.linspace(0.7, 1.3, 6), 1e-6)
    return scaled + nn.functional.rms_norm(y.unflatten(-1, (2, 3)), (2, 3)).flatten(1)


def normed_in_half(host, x, y):
    return nn.functional.rms_norm(host.down(y).half(), (6,), torch.linspace(0.7, 1.3, 6).half(), 1e-3)


def normed_in_double(host, x, y):
    return nn.functional.rms_norm(host.down(y).double(), (6,)).float()


def cut_by_a_size_of_its_input(host, x, y):
    first, last = torch.cat([host.down(y), x]).split([y.shape[0], x.shape[0]])
    return first - last


@torch.library.custom_op("lorac_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


def of_its_own(host, x, y):
    return doubled(y)


def of_another(host, x, y):
    return torch.special.bessel_j0(y)


def emitted(step):
    torch.manual_seed(0)
    host, x = Host(step).eval(), torch.randn(3, 6)
    variant = lorac.LoRA(r=2, targets=("up",))
    return host, x, lorac.compile(host, {"a": variant}, target="onnxruntime", example_inputs=(x,))


def answers(step):
    host, x, compiled = emitted(step)
    with torch.no_grad():
        return compiled(x), host(x)


@pytest.mark.medium("casts of operands and of values", keep=["promoted", "cast"])
@pytest.mark.slow("an op of ours, casts and views", keep=["promoted", "normed", "viewed_as_it_was", "cast", "pooled"])
@pytest.mark.parametrize(
    "step",
    [
        masked,
        cast,
        scores_in_place,
        viewed_as_it_was,
        promoted,
        pooled,
        pooled_along_one_axis,
        numbered,
        cut_in_one,
        taken_from_numbers,
        squeezed_where_it_is_not_one,
        divided_by_next_to_nothing,
        normed,
        normed_in_half,
        normed_in_double,
    ],
    ids=lambda step: step.__name__,
)
def test_decomposes_no_op(step, monkeypatch):
    monkeypatch.setattr(torchlib, "decompose", lambda *_: pytest.fail("decomposed"))
    assert_close(*answers(step))


@pytest.mark.medium("scores that are written in place, in test_emits_the_same_model_as_torch")
@pytest.mark.parametrize(
    "step", [viewed_in_place, seen_through_a_view, of_another_dtype], ids=lambda step: step.__name__
)
def test_mutates_aliased_tensors_as_torch(step):
    assert_close(*answers(step))


def test_accepts_slices_whose_size_is_an_input():
    assert_close(*answers(cut_by_a_size_of_its_input))


@pytest.mark.medium("scores that are written in place, in test_emits_the_same_model_as_torch")
def test_rejects_a_write_that_torch_loses():
    """Up to torch 2.13 its decomposition takes dropout's answer for a new tensor; 2.14 keeps the write."""
    if torch.__version__ >= (2, 14):
        assert_close(*answers(dropped_in_place))
        return
    with refuses("self_test_failed"):
        answers(dropped_in_place)


def test_emits_no_op_for_a_view_of_equal_shape():
    compiled = emitted(viewed_as_it_was)[2]
    nodes = [node.op_type for node in load_emitted(compiled).graph]
    assert nodes.count("Reshape") == 2, "into segments, and joined again"


def test_an_op_without_translation_is_named():
    with pytest.raises(lorac.Unavailable, match=r"no op for lorac_tests::doubled, which .*test_exporter\.py:") as error:
        emitted(of_its_own)
    assert "target='eager'" in str(error.value)


def test_names_the_line_of_a_decomposed_op():
    with pytest.raises(lorac.Unavailable, match=r"no op for prims::bessel_j0, which .*test_exporter\.py:"):
        emitted(of_another)


@pytest.mark.medium("test_decomposes_no_op")
def test_recomputes_only_casts_and_their_readers(monkeypatch):
    """No product, no arange and no view is."""
    computed = []

    def note(node, origin=None):
        computed.append(node.target._schema.name)
        return compute(node, origin)

    compute = type_promotion._compute
    monkeypatch.setattr(type_promotion, "_compute", note)
    emitted(promoted)
    assert set(computed) == {"prims::convert_element_type", "aten::scalar_tensor", "aten::gt", "aten::mul", "aten::div"}


@pytest.mark.medium("the step with casts of operands", cases=["normed"])
@pytest.mark.slow("a step with casts of operands, and one with an own op", keep=["promoted", "normed"])
@pytest.mark.parametrize(
    "step", [masked, cast, promoted, pooled, scores_in_place, normed], ids=lambda step: step.__name__
)
def test_emits_the_same_model_as_torch(step):
    """Node by node, with its attributes and metadata; but torch writes a constant and a size for each reader."""
    program = captured(step)
    torchs = exporter._export_with_torch(program, TRANSLATIONS)
    share_sizes(torchs)
    assert described(exporter._translate(program, TRANSLATIONS)) == described(torchs)


def test_constants_and_sizes_are_written_once():
    nodes = list(exporter._translate(captured(pooled), TRANSLATIONS).graph)
    sizes = [node for node in nodes if node.op_type in {"Constant", "Shape"}]
    keys = {(node.op_type, *node.inputs, *attributes_of(node)) for node in sizes}
    assert len(sizes) == len(keys) > 1


def share_sizes(model):
    """Keep one of equal constants and sizes."""
    known, sizes = {}, set()
    for node in [node for node in model.graph if node.op_type in {"Constant", "Shape", "Concat"}]:
        if node.op_type != "Concat" or sizes.issuperset(node.inputs):
            first = known.setdefault((node.op_type, *node.inputs, *attributes_of(node)), node)
            sizes.add(first.outputs[0])
            if first is not node:
                ir.convenience.replace_all_uses_with(node.outputs, first.outputs)
                model.graph.remove(node, safe=True)


def of_several_ops(host, x, y):
    """Ops that torch has no translation for: with one result, with two, and one that a module is."""
    least, _ = torch.aminmax(torch.diff(torch.movedim(y, 0, 1)), dim=0)
    return nn.functional.batch_norm(host.down(y), x[0], x[1].abs(), training=False) + least[:1]


def test_only_ops_without_a_translation_are_decomposed(monkeypatch):
    monkeypatch.setattr(torchlib, "decompose", lambda *_: pytest.fail("the whole program is traced again"))
    computed, expected = answers(of_several_ops)
    assert_close(computed, expected)


@pytest.mark.medium("`make latest` runs the suite with other releases")
def test_falls_back_to_torchs_exporter_for_untested_releases(monkeypatch):
    monkeypatch.setattr(exporter, "TESTED_RELEASES", ("0.1",))
    monkeypatch.setattr(exporter, "_translate", lambda *_: pytest.fail("not tested"))
    assert_close(*answers(promoted))


def captured(step):
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.export.export(Host(step).eval(), (torch.randn(3, 6),)).run_decompositions({})


def attributes_of(node):
    return sorted(f"{name}={attribute.value!r}" for name, attribute in node.attributes.items())


def number_names(graph):
    """Number the names of values and nodes that the model has no name for in their order."""
    for index, node in enumerate(graph):
        node.name = re.sub(r"(node_[A-Z]\w*_)\d+$", rf"\g<1>{index}", node.name)
        for value in node.outputs:
            value.name = re.sub(r"^val_\d+$", f"val_{index}", value.name)


def described(model):
    number_names(model.graph)
    values = [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]
    nodes = [
        (
            node.op_identifier(),
            node.name,
            [value and value.name for value in node.inputs],
            [(value.name, str(value.type), str(value.shape)) for value in node.outputs],
            attributes_of(node),
            {name: text for name, text in node.metadata_props.items() if name != "pkg.torch.onnx.fx_node"},
        )
        for node in model.graph
    ]
    interface = [(value.name, str(value.type), str(value.shape), dict(value.metadata_props)) for value in values]
    return nodes, interface, dict(model.graph.opset_imports), dict(model.graph.metadata_props), sorted(model.functions)


# ── Other threads ────────────────────────────────────────────────────────────────────────────────────────────────────
def in_another_thread(work):
    """What some work returns, done by another thread while this one waits."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(60)


def translated_meanwhile(work):
    """What another thread's work returns while this thread is in the midst of an emission."""
    results = []

    def translate(x):
        results.append(in_another_thread(work))
        return op.Add(x, x)

    program = torch.export.export(Host(of_its_own).eval(), (torch.randn(3, 6),))
    exporter.export(program, {**TRANSLATIONS, torch.ops.lorac_tests.doubled.default: translate})
    return results[0]


def exported_by_torch(translations=None):
    torch.manual_seed(0)
    program = torch.onnx.export(
        Host(promoted).eval(), (torch.ones(3, 6),), dynamo=True, custom_translation_table=translations, verbose=False
    )
    return described(program.model)


def decomposed_by_torch():
    program = torch.export.export(Host(promoted).eval(), (torch.ones(3, 6),))
    return str(_fx_passes.decompose_with_registry(program, ONNXRegistry.from_torchlib()).graph)


@pytest.mark.medium("test_leaves_the_libraries_unchanged_for_other_threads")
@pytest.mark.slow(
    "another thread's decomposition, and test_leaves_the_libraries_unchanged_for_other_threads",
    cases=["exported_by_torch"],
)
@pytest.mark.parametrize("work", [exported_by_torch, decomposed_by_torch], ids=lambda work: work.__name__)
def test_exports_in_two_threads_are_independent(work):
    assert translated_meanwhile(work) == work()


@pytest.mark.medium("test_leaves_the_libraries_unchanged_for_other_threads")
def test_emission_does_not_depend_on_another_threads_export():
    """Another thread's export is in the midst of a translation while this one emits."""
    program, results = captured(promoted), []

    def multiply(x, weight):
        results.append(in_another_thread(lambda: described(exporter.export(program, TRANSLATIONS))))
        return opset18.MatMul(x, opset18.Transpose(weight, perm=[1, 0]))

    exported_by_torch({torch.ops.aten.linear.default: lambda x, weight, bias: opset18.Add(multiply(x, weight), bias)})
    assert results == [described(exporter.export(program, TRANSLATIONS))] * 2


def test_leaves_the_libraries_unchanged_for_other_threads():
    exporter.export(captured(promoted), TRANSLATIONS)  # what is imported when it is first needed is there
    before = attributes_of_libraries()
    assert translated_meanwhile(attributes_of_libraries) == before


LIBRARIES = ("torch.onnx", "torch.fx.traceback", "torch.fx.experimental", "onnxscript", "onnx_ir")


def attributes_of_libraries():
    """The identity of everything in the modules that emission uses, and in their classes."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(LIBRARIES)]
    values = (value for module in modules for value in list(vars(module).values()))
    classes = {value for value in values if isinstance(value, type) and value.__module__.startswith(LIBRARIES)}
    return {
        (repr(holder), name): id(value)
        for holder in (*modules, *classes)
        for name, value in list(vars(holder).items())
        if not name.startswith("__")
    }
