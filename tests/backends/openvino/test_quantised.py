"""Weights in 8 and 4 bits in OpenVINO: lorac's codes, which ONNX Runtime's products read too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from tests.refusing import refuses
from tests.runtime.generation.test_onnxruntime import GREEDY
from tests.runtime.generation.texts import padded, prompts

pytest.importorskip("openvino")
X = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))
TARGETS = ("openvino", "onnxruntime")
ADAPTERS = {"a": lorac.LoRA(r=3, targets=["up", "down"]), "b": lorac.DoRA(r=2, targets=["up"])}


class Two(nn.Module):
    """Rows of 40 and 72 values, which fill no block of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(40, 72), nn.Linear(72, 56, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def compiled(target: str, **options: Any) -> Any:
    torch.manual_seed(0)
    host = Two().eval()
    adapters = dict(lorac.compile(host, dict(ADAPTERS)).adapters)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (tensor for name in sorted(adapters) for tensor in adapters[name].parameters()):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return lorac.compile(host, adapters, target, (X,), active=None, **options)


@pytest.mark.parametrize("options", [{"weights": "int8"}, {"weights": "int4"}, {"weights": "int4", "symmetric": False}])
def test_computes_with_the_codes_that_onnxruntime_reads(options: dict[str, Any], tmp_path: Path) -> None:
    """Adapters are made from the dequantised weights; once loaded, too."""
    made, other = (compiled(target, accuracy_level=1, **options) for target in TARGETS)
    made.save(tmp_path / "saved")
    loaded = lorac.load(tmp_path / "saved", threads=1)
    for choice in (None, "a", "b", ["a", "b", None]):
        wanted = other(X, adapters=choice)
        assert_close(made(X, adapters=choice), wanted)
        assert_close(loaded(X, adapters=choice), wanted)
    with pytest.raises(AssertionError):
        assert_close(made(X), compiled("openvino")(X))
    assert "stored as" in str(made.explain())


@pytest.mark.parametrize("tied", [False, True])
def test_generates_with_four_bits(tied: bool, tmp_path: Path) -> None:
    """Embeddings are looked up in codes, which a tied output layer shares; rotary factors are not."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=tied, initializer_range=0.3)
    host = transformers.LlamaForCausalLM(config).eval()
    adapters = {"a": lorac.LoRA(r=3, targets=["q_proj", "down_proj"])}
    options = {"cache": True, "weights": "int4", "accuracy_level": 1, "active": None}
    made, other = (lorac.compile(host, adapters, target=target, **options) for target in TARGETS)
    batch = {**padded(prompts(), "left"), **GREEDY, "eos_token_id": None}
    wanted = other.generate(**batch)
    assert torch.equal(made.generate(**batch), wanted)
    assert not torch.equal(lorac.compile(host, target="openvino", cache=True).generate(**batch), wanted)
    made.save(tmp_path / "saved")
    assert torch.equal(lorac.load(tmp_path / "saved").generate(**batch), wanted)


def test_merges_before_it_quantises() -> None:
    host = Two().eval()
    adapters = {"a": lorac.LoRA(r=3, targets=["up"])}
    options = {"mode": "baked", "weights": "int8", "accuracy_level": 1, "active": "a"}
    made, other = (lorac.compile(host, adapters, target, (X,), **options) for target in TARGETS)
    assert_close(made(X), other(X))


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_rounds_operands_as_onnxruntime_does(block_size: int) -> None:
    """By default, in blocks of a row, whichever rows are beside it: as far from exact products as ONNX Runtime."""
    torch.manual_seed(0)
    host, x = nn.Linear(256, 96).eval(), torch.randn(64, 256)
    options = {"weights": "int8", "block_size": block_size}
    rounded = {target: lorac.compile(host, target=target, example_inputs=(x,), **options) for target in TARGETS}
    exact = lorac.compile(host, target="openvino", example_inputs=(x,), accuracy_level=1, **options)(x)
    off = {target: float((made(x) - exact).norm()) for target, made in rounded.items()}
    assert 0 < off["openvino"] <= off["onnxruntime"] * 2
    assert torch.equal(rounded["openvino"](x)[:8], rounded["openvino"](x[:8]))
    assert "accuracy_level=1 rounds nothing" in str(rounded["openvino"].explain())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int2"}, "weights cannot be stored as"),
        ({"weights": "int8", "mixed": True}, "mixed=True"),
        ({"weights": "int4", "block_size": 48}, "block_size cannot be 48"),
        ({"symmetric": False}, "symmetric= sets how weights are quantised, and no weights are"),
        ({"weights": "int4", "accuracy_level": 2}, "accuracy_level cannot be 2"),
        ({"accuracy_level": 4}, "accuracy_level= sets how weights are quantised, and no weights are"),
    ],
)
def test_rejects_wrong_options(options: dict[str, Any], words: str) -> None:
    with refuses("option_error", match=words):
        compiled("openvino", **options)
