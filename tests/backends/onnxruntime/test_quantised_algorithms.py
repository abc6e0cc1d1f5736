"""Algorithms that choose codes, and the calls of a model that GPTQ learns from."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import lorac
from lorac import OptionError
from lorac.backends.onnx.quantised.algorithms import GPTQ, K_QUANT, RTN, encode
from lorac.backends.onnx.quantised.calibration import Calibration
from lorac.backends.onnx.quantised.codec import Codec
from lorac.backends.onnxruntime.options import OnnxRuntimeOptions
from lorac.frontend.base_weights import make_base_reader
from lorac.frontend.model_view import ModelView
from lorac.testing import assert_close

ROWS, COLUMNS, READ = 24, 72, 400  # columns that fill no block
CODECS = [Codec(4, 32, True), Codec(4, 16, False), Codec(8, 32, True)]


def layer(seed=0):
    """A matrix, and what a product with it reads: values that depend on one another."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((READ, 9)) @ random.standard_normal((9, COLUMNS)) + random.standard_normal(COLUMNS) / 4
    return random.standard_normal((ROWS, COLUMNS)).astype(np.float32), x.astype(np.float32)


def error(codec, algorithm):
    matrix, x = layer()
    encoded = encode(codec, matrix, algorithm, torch.from_numpy(x.T @ x))
    return np.square(x @ (encoded.decode() - matrix).T).sum()


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_gptq_has_a_smaller_error_than_rounding(codec):
    assert error(codec, GPTQ) < error(codec, RTN) / 2


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec.symmetric], ids=str)
def test_gptq_rounds_to_nearest_for_uncorrelated_columns(codec):
    matrix, _ = layer()
    encoded = encode(codec, matrix, GPTQ, torch.eye(COLUMNS))
    steps = np.repeat(encoded.scales, codec.block, 1)[:, :COLUMNS]
    half = 2 ** (codec.bits - 1)
    nearest = np.stack([np.abs(step * steps - matrix) for step in range(-half, half)]).min(0)
    assert_close(torch.from_numpy(np.abs(encoded.decode() - matrix)), torch.from_numpy(nearest))


def test_gptq_bears_columns_that_are_never_read():
    matrix, x = layer()
    x[:, ::2] = 0
    found = [encode(CODECS[0], matrix, algorithm, torch.from_numpy(x.T @ x)).decode() for algorithm in (GPTQ, RTN)]
    by_gptq, nearest = (np.square(x @ (values - matrix).T).sum() for values in found)
    assert np.isfinite(found[0]).all()
    assert by_gptq < nearest


def test_k_quants_are_the_librarys():
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    matrix = layer()[0][:, :64]
    matrix[3] = 0
    encoded = encode(Codec(4, 32, False), matrix, K_QUANT, None)
    whole, scales, zeros = quant_tensor_k_quant_cpu(matrix[:3], 4, 32)
    wanted = (whole - zeros) * scales
    assert_close(torch.from_numpy(encoded.decode()[:3]), torch.from_numpy(wanted.reshape(3, 64).astype(np.float32)))
    assert not encoded.decode()[3].any()


class Branching(nn.Module):
    """Two layers that read one tensor, one that reads their sum, and one that nothing calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.idle = (nn.Linear(COLUMNS, ROWS) for _ in range(3))
        self.last = nn.Linear(ROWS, COLUMNS)

    def forward(self, x):
        return self.last(self.left(x) + self.right(x))


def calibrate(model, calls):
    return Calibration(model, ModelView.of(model).sites, make_base_reader(model), calls)


def test_moments_are_of_each_layers_input():
    model, calls = Branching(), [torch.from_numpy(layer(seed)[1]) for seed in range(2)]
    calibration = calibrate(model, [{"x": x} for x in calls])
    read = torch.cat(calls)
    found = calibration.find(("right",), model.right.weight)
    of_read, inner = read.t() @ read, (model.left(read) + model.right(read)).detach()
    assert_close(found, of_read)
    fused = torch.cat([model.left.weight, model.right.weight])
    assert_close(calibration.find((), fused), of_read)
    assert_close(calibration.find(("last",), model.last.weight), inner.t() @ inner)
    assert calibration.find(("idle",), model.idle.weight) is None
    assert calibration.missed == ["idle"]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_rejects_a_call_that_the_model_does_not_take():
    with pytest.raises(OptionError, match=r"cannot be called with calibration\[0\]"):
        calibrate(Branching(), [{"y": torch.ones(1)}]).find(("left",), Branching().left.weight)


def test_a_model_that_writes_no_text_needs_calls():
    with pytest.raises(OptionError, match="needs calls of the model"):
        calibrate(Branching(), [])


@pytest.mark.parametrize("given", [{"head": "int8"}, {"algorithm": GPTQ}], ids=str)
def test_options_about_codes_need_weights_to_choose_them_for(given):
    with pytest.raises(OptionError, match=f"{next(iter(given))}= sets how weights are quantised, and no weights are"):
        OnnxRuntimeOptions(**given)


@pytest.mark.medium("the algorithm on single layers, and cli/test_cli.py compiles by it")
def test_a_compiled_model_is_nearer_to_its_own_for_gptq():
    """With texts that the model writes itself, which leaves the random state as it was."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=48, max_position_embeddings=32, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 48, (4, 16))
    wanted, state = model(input_ids=ids).logits, torch.get_rng_state()
    options = {"target": "onnxruntime", "weights": "int4", "accuracy_level": 1, "self_test": False}
    off = {}
    for algorithm in (RTN, GPTQ):
        compiled = lorac.compile(model, {"a": lorac.LoRA(r=2)}, algorithm=algorithm, **options)
        off[algorithm] = (compiled(input_ids=ids, adapters=None).logits - wanted).norm()
    assert off[GPTQ] < off[RTN]
    assert torch.equal(torch.get_rng_state(), state)
