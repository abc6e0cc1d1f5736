"""The dtype of a model, the one asked for and the one a target computes in: inputs follow, and nothing is silent."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import lorac
from lorac.backends.onnx.model_files import MODEL_FILE
from lorac.testing import adapter_away, assert_parity
from lorac.testing.hosts import Block
from tests.backends import throw_away

WIDE = "no kernels for float16: it computes in float32, and its outputs are in float32"


class Net(nn.Module):
    """Two layers, a block between them, and a count that is no floating-point input."""

    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = nn.Linear(6, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList([Block(8, 4)])

    def forward(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return self.back(self.blocks[0](self.front(x))) * times


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def adapter(net: Net) -> lorac.Adapter:
    """A LoRA away from its init."""
    made = lorac.compile(net, {"a": lorac.LoRA(r=2, targets=["front", "back"])}).adapters["a"]
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.normal_(std=0.1, generator=torch.Generator().manual_seed(tensor.numel()))
    return made


def inputs(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    return {"x": x.to(dtype), "times": torch.tensor([2])}


@pytest.mark.parametrize("asked", ["float16", "torch.float16", torch.float16], ids=str)
def test_accepts_a_dtype_by_name(asked: Any, net: Net, adapter: lorac.Adapter) -> None:
    compiled = lorac.compile(net, {"a": adapter}, dtype=asked)
    assert {p.dtype for p in compiled.host.parameters()} == {torch.float16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}, "the host was cast"
    assert compiled(**inputs(torch.float16)).dtype == torch.float16
    assert compiled.explain().casts == ()


@pytest.mark.parametrize(("asked", "nearest"), [("flaot16", "float16"), ("bf16", "bfloat16"), (torch.int8, None)])
def test_an_unknown_dtype(asked: Any, nearest: str | None, net: Net) -> None:
    with pytest.raises(lorac.OptionError, match="dtype= cannot be") as raised:
        lorac.compile(net, {"a": lorac.LoRA(r=2)}, dtype=asked)
    assert raised.value.nearest == nearest


@pytest.mark.medium("the other dtype", cases=["dtype1"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_casts_inputs_with_the_model(dtype: torch.dtype, net: Net, adapter: lorac.Adapter) -> None:
    """In calls, by row too, and among the example inputs: the graph is captured in the dtype asked for."""
    compiled = lorac.compile(net, {"a": adapter}, dtype=dtype, example_inputs=inputs())
    answer = compiled(**inputs(dtype))
    assert torch.equal(compiled(**inputs()), answer)
    rows = compiled(**inputs(), adapters=["a"] * 3)
    assert rows.dtype == answer.dtype == dtype
    assert f"{str(dtype).removeprefix('torch.').replace('float', 'f')}[" in str(compiled.graph)


def test_wider_in_onnxruntime(net: Net, adapter: lorac.Adapter) -> None:
    example = UserDict(inputs())  # as transformers' processors give them
    compiled = lorac.compile(net, {"a": adapter}, "onnxruntime", example, dtype="float64")
    answer = compiled(**inputs())
    assert answer.dtype == torch.float64
    wide = lorac.compile(net.double(), {"a": adapter})
    assert_parity(answer, wide(**inputs(torch.float64)), net(**inputs(torch.float64)))


def test_warns_and_keeps_float32_where_the_target_lacks_the_dtype(net: Net, adapter: lorac.Adapter) -> None:
    """Asked for half precision, ONNX Runtime computes with the weights as they are, and says so once."""
    with pytest.warns(lorac.LoracWarning, match=WIDE) as warned:
        compiled = lorac.compile(net, {"a": adapter}, "onnxruntime", inputs(), dtype="float16")
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert compiled.explain().casts == (("f16", "f32"),)
    plain = lorac.compile(net, {"a": adapter}, "onnxruntime", inputs())
    assert torch.equal(compiled(**inputs()), plain(**inputs()))


@pytest.mark.medium("test_a_target_that_computes_in_half_precision")
def test_a_half_host_goes_from_target_to_target(net: Net, adapter: lorac.Adapter) -> None:
    """The example inputs follow the host into every target that it is exported to."""
    net.half()
    with pytest.warns(lorac.LoracWarning, match=WIDE):
        compiled = lorac.compile(net, {"a": adapter}, "onnxruntime", inputs(torch.float16))
    eager = compiled.export(target="eager")
    assert eager(**inputs(torch.float16)).dtype == torch.float16
    assert "f16[" in str(eager.graph)
    with pytest.warns(lorac.LoracWarning, match=WIDE):
        again = eager.export()
    halved = inputs(torch.float16)
    assert torch.equal(again(**halved), compiled(**halved))
    assert compiled(**halved).dtype == torch.float32


def test_a_branchs_noise_has_its_slots_dtype(net: Net) -> None:
    """The self-test of a float64 program with a router, which is no weight form."""
    net.double()
    compiled = lorac.compile(
        net, {"a": lorac.MeteoRA(r=2, targets=["front"])}, "onnxruntime", inputs(torch.float64), active=None
    )
    assert torch.equal(compiled(**inputs(torch.float64)), compiled(**inputs(torch.float64), adapters=None))


def test_a_bias_that_the_host_lacks_has_its_dtype() -> None:
    """Written in place, in float64, at a layer without a bias."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8, bias=False)).double(), torch.randn(3, 6, dtype=torch.float64)
    away = adapter_away(lorac.Hydra(r=2, branch_bias=True), model, x, name="a", seed=1)
    compiled = lorac.compile(model, {"a": away}, "onnxruntime", (x,), mode="fused")
    assert_parity(compiled(x), lorac.compile(model, {"a": away})(x), model(x))


def test_rejects_a_stored_half_precision_program_without_kernels(
    net: Net, adapter: lorac.Adapter, tmp_path: Path
) -> None:
    lorac.compile(net, {"a": adapter}, dtype="bfloat16", example_inputs=inputs()).save(tmp_path / "half")
    loaded = lorac.load(tmp_path / "half")
    assert loaded(**inputs(torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(lorac.Unavailable, match="holds a program in bfloat16, and onnxruntime has no kernels"):
        lorac.load(tmp_path / "half", target="onnxruntime")


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.act = nn.Linear(6, 8), nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.front(x))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.front = nn.Conv1d(1, 4, 3), nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.front(self.conv(x.unsqueeze(1)).mean(-1))


@pytest.mark.medium("frontend/capture/test_host_forms.py: recurrent layers in float64 are named")
@pytest.mark.parametrize(
    ("model", "variant", "op"),
    [
        (Gelu, lorac.LoRA(r=2), "Erf (part of Gelu) in float64, which 'act' asks for"),
        (Conv, lorac.LoRA(r=2, targets=["front"]), "Conv in float64, which 'conv' asks for"),
        (Net, lorac.AdapterTune(r=2), "Erf (part of Gelu) in float64, which 'blocks.0' asks for"),
    ],
)
def test_names_ops_without_a_float64_kernel(model: Any, variant: Any, op: str) -> None:
    given = inputs(torch.float64)
    example = given if model is Net else {"x": given["x"]}
    with pytest.raises(lorac.Unavailable) as raised:
        lorac.compile(model().double(), {"a": variant}, "onnxruntime", example)
    assert f"onnxruntime has no kernel for {op}, line " in str(raised.value)
    assert f" of {__file__}" in str(raised.value)
    compiled = lorac.compile(model().double(), {"a": variant}, "onnxruntime", example, dtype="float32")
    assert compiled(**example).dtype == torch.float32


@pytest.mark.medium("the other method", cases=["variant1"])
@pytest.mark.parametrize("variant", [lorac.MeteoRA(r=2, targets=["front"]), lorac.AdapterTune(r=2, init="small")])
def test_a_target_that_computes_in_half_precision(variant: Any, net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its program has half-precision inputs and outputs, and factors in float32; a branch is gated all the same."""
    half = throw_away.Plain(dataclasses.replace(throw_away.DIALECT, dtypes=(torch.float16,)))
    monkeypatch.setattr("lorac.session.request.compile_request.find_backend", lambda target: half)
    compiled = lorac.compile(net.half(), {"a": variant}, "plain", inputs(torch.float16), active=None)
    graph = ir.from_proto(onnx.load_model_from_string(compiled.engine.files[MODEL_FILE].read())).graph
    own = {value.name: value.dtype for value in graph.inputs}
    assert str(own["x"]) == str(graph.outputs[0].dtype) == "FLOAT16"
    assert all(str(kind) == "FLOAT" for name, kind in own.items() if ":branch" in name)
    assert "Where" in {node.op_type for node in graph.all_nodes()}
    assert compiled(**inputs(torch.float16)).dtype == torch.float16
