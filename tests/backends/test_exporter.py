"""What is emitted without decomposition, and that torch's exporter is left as it was."""

import operator

import onnx_ir as ir
import pytest
import torch
from onnx_ir.schemas import OpSignature
from torch import nn
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter

import lorac
from lorac.backends.onnx import exporter
from lorac.backends.onnx.model_files import MODEL_FILE
from lorac.testing.eager_checks import assert_close
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


def pooled(host, x, y):
    return host.down(y) * nn.functional.adaptive_avg_pool2d((y @ x.t())[None], (1, 1))[0]


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


@pytest.mark.parametrize(
    "step",
    [
        masked,
        cast,
        scores_in_place,
        viewed_as_it_was,
        promoted,
        pooled,
        taken_from_numbers,
        squeezed_where_it_is_not_one,
        divided_by_next_to_nothing,
        normed,
        normed_in_half,
        normed_in_double,
    ],
    ids=lambda step: step.__name__,
)
def test_nothing_is_decomposed(step, monkeypatch):
    def decompose(*_):
        pytest.fail("decomposed")

    monkeypatch.setattr(_fx_passes, "decompose_with_registry", decompose)
    assert_close(*answers(step))


@pytest.mark.parametrize(
    "step", [viewed_in_place, seen_through_a_view, of_another_dtype], ids=lambda step: step.__name__
)
def test_what_others_may_see_is_written_as_torch_does(step):
    assert_close(*answers(step))


def test_parts_may_be_as_large_as_an_input_says():
    assert_close(*answers(cut_by_a_size_of_its_input))


def test_what_torch_loses_is_not_answered():
    """Its decomposition takes dropout's answer for a new tensor."""
    with refuses("self_test_failed"):
        answers(dropped_in_place)


def test_a_view_of_the_same_shape_is_no_op():
    compiled = emitted(viewed_as_it_was)[2]
    assert "Reshape" not in {node.op_type for node in ir.load(compiled.engine.folder / MODEL_FILE).graph}


def test_an_op_without_translation_is_named():
    with pytest.raises(lorac.Unavailable, match=r"no op for lorac_tests::doubled, which .*test_exporter\.py:") as error:
        emitted(of_its_own)
    assert "target='eager'" in str(error.value)


def test_an_op_that_another_is_taken_apart_into_is_named_with_the_line():
    with pytest.raises(lorac.Unavailable, match=r"no op for prims::bessel_j0, which .*test_exporter\.py:"):
        emitted(of_another)


def test_shapes_are_computed_of_what_is_cast_alone(monkeypatch):
    computed = []

    def noted(interpreter, target, args, kwargs):
        computed.append(target)
        return target(*args, **kwargs)

    monkeypatch.setattr(_TypePromotionInterpreter, "call_function", noted)
    emitted(promoted)
    # The casts that are put in, and the ops whose operands they change; no product, no arange and no view.
    assert {target._schema.name for target in computed} == CAST


CAST = {"prims::convert_element_type", "aten::scalar_tensor", "aten::gt", "aten::mul", "aten::div"}


def _replaced():
    return (
        _fx_passes.decompose_with_registry,
        vars(ONNXRegistry)["from_torchlib"],
        _TypePromotionInterpreter.run_node,
        vars(OpSignature)["from_op_schema"],
    )


def test_torchs_exporter_stays_as_it_was():
    before = _replaced()
    answers(masked)
    assert _replaced() == before


def test_translations_of_one_op_are_those_that_all_have():
    whole = exporter._whole_registry().functions
    for op in (torch.ops.aten.mul.Tensor, torch.ops.aten.embedding.default, torch.ops.aten.view.default, operator.add):
        own = exporter._registry_of(exporter._torchlib_name(op)).functions
        key = op.name() if isinstance(op, torch._ops.OpOverload) else op
        assert [found.onnx_function for found in own[key]] == [found.onnx_function for found in whole[key]]
        assert len(own) < len(whole) / 10


def test_what_an_op_takes_is_read_once(monkeypatch):
    read = []

    def noted(schema):
        read.append((schema.name, schema.since_version))
        return own(schema)

    own = exporter._read_signature
    monkeypatch.setattr(exporter, "_read_signature", noted)
    exporter._signature.cache_clear()
    compiled = emitted(promoted)[2]
    assert {"Mul", "Add"} <= {name for name, _ in read}
    assert len(set(read)) == len(read)
    names = [node.op_type for node in ir.load(compiled.engine.folder / MODEL_FILE).graph]
    assert names.count("Cast") > 1
