"""Models that other libraries have quantised, in ONNX Runtime: codes that its products take are taken as they are.

Neither library is installed where these run, so what they make is stood in for by classes of the same names and parts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import lorac
from lorac import LoracWarning
from lorac.frontend.quantised_weights import QUANTISATION_LEVELS, QuantisedMatrix
from lorac.testing import assert_close
from tests.emitted import read_emitted
from tests.refusing import refuses


class IntxUnpackedToInt8Tensor(torch.Tensor):
    """As torchao's: int8 numbers with a scale and a zero point for each group of a row."""

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor, zero_point: Tensor, target_dtype: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype)

    def __init__(self, qdata: Tensor, scale: Tensor, zero_point: Tensor, target_dtype: Any) -> None:
        self.qdata, self.scale, self.zero_point, self.target_dtype = qdata, scale, zero_point, target_dtype

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            args = tree_map(lambda t: t.dequantize() if isinstance(t, cls) else t, args)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.detach.default, torch.ops.aten._to_copy.default):
            it = args[0]
            copied = cls(it.qdata, it.scale, it.zero_point, it.target_dtype)
            copied.__dict__.update(it.__dict__)
            return copied
        raise NotImplementedError(f"{cls.__name__} dispatch: attempting to run unimplemented operator {function}")

    def dequantize(self) -> Tensor:
        return QuantisedMatrix(8, self.qdata, self.scale, self.zero_point).dequantised()


class Float8Tensor(IntxUnpackedToInt8Tensor):
    """As torchao's: numbers of 8 bits with an exponent, and a scale of each row."""

    def dequantize(self) -> Tensor:
        return self.qdata.float() * self.scale


class Linear8bitLt(nn.Linear):
    """As bitsandbytes': int8 numbers, and the largest value of each row."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        return nn.functional.linear(x, weight.data * (weight.SCB / 127)[:, None], self.bias)


class MovingLinear8bitLt(Linear8bitLt):
    """As bitsandbytes' when it is called first: it moves the scales from its weight into its own state."""

    scales: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        if weight.SCB is not None:
            self.scales, weight.SCB = weight.SCB, None
        assert self.scales is not None, "another copy of the layer took them"
        return nn.functional.linear(x, weight.data * (self.scales / 127)[:, None], self.bias)

    def _save_to_state_dict(self, *_: Any) -> None:
        raise AssertionError("bitsandbytes' own repacks the weight, and rounds it anew")


class RoundingLinear8bitLt(Linear8bitLt):
    """With what it reads rounded to 8 bits for each row, as bitsandbytes' own does."""

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / step).round() * step)


class Params(torch.nn.Parameter):
    """Stands for the classes of their parameters."""


def numbers(bits: int, *shape: int) -> Tensor:
    half = 1 << bits - 1
    return torch.randint(-half, half, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.int8)


def in_torchao(layer: nn.Linear, bits: int, group: int, shifted: bool) -> nn.Linear:
    rows, groups = layer.out_features, layer.in_features // group
    scale = torch.rand(rows, groups, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.001
    zero = numbers(bits - 1, rows, groups) if shifted else torch.zeros(rows, groups, dtype=torch.int8)
    target = getattr(torch, f"int{bits}")
    weight = IntxUnpackedToInt8Tensor(numbers(bits, *layer.weight.shape), scale, zero, target)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def in_float8(layer: nn.Linear, **parts: Any) -> nn.Linear:
    scale = layer.weight.detach().abs().amax(1, keepdim=True) / 448
    codes = (layer.weight.detach() / scale).to(torch.float8_e4m3fn)
    weight = Float8Tensor(codes, scale, torch.zeros_like(scale), codes.dtype)
    vars(weight).update(parts)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    vars(layer.weight).update(vars(weight))
    return layer


def in_bitsandbytes(layer: nn.Linear) -> nn.Linear:
    own = Linear8bitLt(layer.in_features, layer.out_features)
    whole = layer.weight.detach()
    own.weight = Params(numbers(8, *whole.shape), requires_grad=False)
    own.weight.SCB = whole.abs().amax(1)  # type: ignore[attr-defined]  # as theirs has it
    return own


MADE = {
    "torchao, 4 bits": lambda layer: in_torchao(layer, 4, 32, shifted=True),
    "torchao, 8 bits": lambda layer: in_torchao(layer, 8, 16, shifted=False),
    "torchao, rows": lambda layer: in_torchao(layer, 8, layer.in_features, shifted=True),
    "bitsandbytes, 8 bits": in_bitsandbytes,
}
ROUNDED = ["products with 1 weights of the model round their inputs ('site.weight')"]
"""bitsandbytes multiplies by 8-bit weights what it has rounded to 8 bits, too."""
X = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))


def model(how: Any) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential()
    made.add_module("site", how(nn.Linear(96, 40)))
    made.add_module("act", nn.Tanh())
    made.add_module("last", nn.Linear(40, 8))
    return made.eval()


def products(compiled: Any) -> list[onnx.NodeProto]:
    found, _ = read_emitted(compiled)
    return [node for node in found.graph.node if node.op_type == "MatMulNBits"]


@pytest.mark.medium("a layout of each library", keep=["torchao, 4 bits", "bitsandbytes, 8 bits"])
@pytest.mark.parametrize("how", MADE)
@torch.no_grad()
def test_codes_are_taken_as_they_are(how: str, recwarn: pytest.WarningsRecorder) -> None:
    own = model(MADE[how])
    kind = type(own.site.weight if how.startswith("torchao") else own.site)
    options = {"target": "onnxruntime", "example_inputs": (X,)}
    compiled = lorac.compile(own, {"a": lorac.LoRA(r=2, targets=["site"])}, active=None, **options)
    said = [str(w.message) for w in recwarn if issubclass(w.category, LoracWarning)]
    assert [text.partition(",")[0] for text in said] == (ROUNDED if how.startswith("bitsandbytes") else [])
    assert_close(compiled(X), own(X))
    assert "round their inputs" not in str(compiled.explain()), "the model's own products do not"
    assert len(products(compiled)) == 1, "what came in float stays in float"
    weight: Any = own.site.weight
    whole = (weight.qdata if how.startswith("torchao") else weight.data).numpy()
    bits = 4 if "4 bits" in how else 8
    stored, held = read_emitted(compiled)
    name = next(t.name for t in stored.graph.initializer if t.name.endswith(f"_Q{bits}"))
    packed = (
        held[name]
        if name in held
        else onnx.numpy_helper.to_array(next(t for t in stored.graph.initializer if t.name == name))
    )
    spread = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1)
    assert np.array_equal(spread.reshape(len(whole), -1)[:, : whole.shape[1]], whole.astype(int) + (1 << bits - 1))
    assert type(own.site.weight if how.startswith("torchao") else own.site) is kind, "the host is as it was"
    assert compiled.sites["site"].packed == kind.__name__
    with refuses("not_mergeable", match=f"into the {kind.__name__} weight of 'site'"):
        lorac.compile(own, {"a": lorac.LoRA(r=2, targets=["site"])}, mode="fused", **options)


@pytest.mark.parametrize("weights", [None, "int8"])
@torch.no_grad()
def test_warns_and_dequantises_codes_whose_blocks_span_rows(weights: str | None) -> None:
    own = model(lambda layer: InTable(layer, compressed=False))
    options = {"target": "onnxruntime", "example_inputs": (X,), "self_test": False}
    says = "stored as float32\n.*weights='int8'" if weights is None else "quantised anew, as int8"
    with pytest.warns(LoracWarning, match=f"1 weights were stored as Linear4bit, .*: they are {says}"):
        compiled = lorac.compile(own, weights=weights, **options)
    assert len(products(compiled)) == (0 if weights is None else 2)
    if weights is None:
        assert_close(compiled(X), own(X))


@torch.no_grad()
def test_explains_the_rounding_of_products() -> None:
    """To int8 where that is asked for; where the model's own products do, the program's do not."""
    own = model(MADE["torchao, 8 bits"])
    options = {"target": "onnxruntime", "example_inputs": (X,)}
    rounding = lorac.compile(own, accuracy_level=4, **options)
    assert "products with them round what they read to int8; accuracy_level=1" in str(rounding.explain())
    with pytest.raises(AssertionError):
        assert_close(rounding(X), own(X))
    vars(own.site.weight)["activation_quantization"] = "int8_asym_per_token"
    with pytest.warns(LoracWarning, match=re.escape(ROUNDED[0])):
        lorac.compile(own, **options)


@pytest.mark.medium("the other", cases=["True"])
@pytest.mark.parametrize("scaled", [False, True])
@torch.no_grad()
def test_other_numbers_of_8_bits_are_dequantised(scaled: bool) -> None:
    """With what a product multiplies its inputs by, where a method of quantising made that a part of the weight."""
    scale = torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.5 if scaled else None
    own = model(functools.partial(in_float8, act_pre_scale=scale))
    with pytest.warns(LoracWarning) as warned:
        compiled = lorac.compile(
            own, {"a": lorac.LoRA(r=2, targets=["site"])}, target="onnxruntime", example_inputs=(X,)
        )
    texts = "\n".join(str(one.message) for one in warned)
    assert "1 weights were stored as Float8Tensor" in texts
    assert ("outputs differ by" in texts) is scaled  # its own product ignores the scale
    assert_close(compiled(X), own.last(own.act(own.site(X if scale is None else X * scale))))


@pytest.mark.parametrize("how", ["torchao, 8 bits", "torchao, rows", "float8"])
def test_methods_that_read_weights_read_float_values_in_eager_mode(how: str, tmp_path: Path) -> None:
    """Made fresh, and from a file; the oracle is the model with plain weights."""
    own = model({**MADE, "float8": in_float8}[how])
    plain = model(lambda layer: layer)
    with torch.no_grad():
        plain.site.weight.copy_(own.site.weight.dequantize())
    trained = lorac.compile(own, {"a": lorac.DoRA(r=2, targets=["site"])}, example_inputs=(X,)).train()
    for tensor in trained.adapters["a"].parameters():
        torch.nn.init.normal_(tensor, 0.5, 0.1, generator=torch.Generator().manual_seed(1))
    lorac.save_adapter(trained.adapters["a"], tmp_path / "dora", model=own)
    read, oracle = (lorac.compile(host, tmp_path / "dora", example_inputs=(X,)) for host in (own, plain))
    for ours in (trained, read):
        assert_close(ours(X), oracle(X))
    trained(X).sum().backward()
    oracle.train()(X).sum().backward()
    for name, tensor in trained.adapters["a"].tensors["site"].items():
        assert_close(tensor.grad, oracle.adapters["dora"].tensors["site"][name].grad)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("method", [lorac.LoRA, lorac.DoRA])
@pytest.mark.parametrize("bits", [4, 8])
def test_layers_of_bitsandbytes_train_in_eager_mode(bits: int, method: Any, tmp_path: Path) -> None:
    """Products are the layer's own; the oracle is the layer with float weights."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 40)
    own = nn.Sequential(InTable(layer) if bits == 4 else in_bitsandbytes(layer))
    quantised: Any = own[0]
    held = quantised.weight
    layer.weight.data = quantised.whole if bits == 4 else held.data * (held.SCB / 127)[:, None]
    layer.bias = quantised.bias
    plain, x = nn.Sequential(layer), torch.randn(3, 128)
    assert lorac.sites(own)["0"].packed == type(quantised).__name__
    trained = lorac.compile(own, {"a": method(r=2, targets=["0"])}, example_inputs=(x,)).train()
    for tensor in trained.adapters["a"].parameters():
        torch.nn.init.normal_(tensor, 0.5, 0.1)
    lorac.save_adapter(trained.adapters["a"], tmp_path / "a", model=own)
    read, oracle = (lorac.compile(host, tmp_path / "a", example_inputs=(x,)) for host in (own, plain))
    for ours in (trained, read):
        assert_close(ours(x), oracle(x))
    trained(x).sum().backward()
    oracle.train()(x).sum().backward()
    for name, tensor in trained.adapters["a"].tensors["0"].items():
        assert_close(tensor.grad, oracle.adapters["a"].tensors["0"][name].grad)
    with refuses("not_mergeable", match="nothing can be merged into the Linear"):
        lorac.compile(own, tmp_path / "a", mode="fused", example_inputs=(x,))


@torch.no_grad()
def test_calls_of_a_compiled_model_leave_the_layers_of_the_host_alone() -> None:
    """The library's layers write into attributes of their weights."""
    own = model(in_bitsandbytes)
    expected = own(X)
    own.site.__class__ = MovingLinear8bitLt
    first = lorac.compile(own, {"a": lorac.LoRA(r=2, targets=["site"])})
    for compiled in (first, lorac.compile(own, {"a": lorac.LoRA(r=2, targets=["site"])})):
        assert torch.equal(compiled(X, adapters=None), expected)
        assert not [key for key in compiled.state_dict() if "site" in key and "lora" not in key]
    assert torch.equal(own(X), expected)
    assert torch.equal(first(X, adapters=None), expected)


LEVELS = Tensor(QUANTISATION_LEVELS["nf4"])


class InTable(nn.Linear):
    """As bitsandbytes' in 4 bits, with all that its state holds."""

    def __init__(self, layer: nn.Linear, block: int = 64, compressed: bool = True) -> None:
        super().__init__(layer.in_features, layer.out_features)
        self.bias = layer.bias
        blocks = layer.weight.detach().reshape(-1, block)
        scale = blocks.abs().amax(1)
        # Statistics in 8 bits: steps of 1/127 around their mean.
        offset, step = scale.mean(), (scale - scale.mean()).abs().max() / 127
        steps = ((scale - offset) / step).round()
        scale = steps * step + offset if compressed else scale
        places = (blocks / scale[:, None]).unsqueeze(-1).sub(LEVELS).abs().argmin(-1)
        self.whole = (LEVELS[places] * scale[:, None]).view_as(layer.weight)
        pairs = places.view(-1, 2).to(torch.uint8)
        self.weight = Params((pairs[:, :1] << 4 | pairs[:, 1:]), requires_grad=False)
        state = {"quant_type": "nf4", "blocksize": block, "shape": layer.weight.shape, "code": LEVELS}
        held = {"absmax": steps if compressed else scale, "state2": step, "offset": offset, "nested": compressed}
        self.weight.quant_state = SimpleNamespace(**state, **held)  # type: ignore[attr-defined]  # as theirs has it

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.whole, self.bias)


InTable.__name__ = "Linear4bit"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for bitsandbytes' functions."""
    own = SimpleNamespace(dequantize_blockwise=lambda steps, state: steps * state)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", own)


def in_table(compressed: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = {"first": nn.Linear(128, 192), "act": nn.Tanh(), "second": nn.Linear(192, 128, bias=False)}
    made = nn.Sequential()
    for name, layer in layers.items():
        made.add_module(name, InTable(layer, compressed=compressed) if isinstance(layer, nn.Linear) else layer)
    made.add_module("norm", nn.LayerNorm(128))
    return made.eval().requires_grad_(False)


@pytest.mark.medium("codes that are taken as they are")
@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("compressed", [True, False])
@torch.no_grad()
def test_codes_of_a_table_are_the_products_own(
    compressed: bool, tmp_path: Any, recwarn: pytest.WarningsRecorder
) -> None:
    own, x = in_table(compressed), torch.randn(5, 128)
    adapters = {"a": lorac.LoRA(r=2, targets=["first", "second"])}
    compiled = lorac.compile(own, adapters, target="onnxruntime", example_inputs=(x,), active=None)
    assert not [w for w in recwarn if issubclass(w.category, LoracWarning)]
    found, _ = read_emitted(compiled)
    kinds = [node.op_type for node in found.graph.node]
    assert kinds.count("MatMulBnb4") == 2
    again = torch.randn(3, 128)
    for rows in (x, again):
        assert_close(compiled(rows), own(rows))
    assert "weights: 2 stored as nf4, in blocks of 64" in str(compiled.explain())
    compiled.save(tmp_path)
    assert_close(lorac.load(tmp_path)(again), own(again))


@pytest.mark.medium("codes taken as they are, and variants/test_qst.py over float weights")
@pytest.mark.usefixtures("library")
def test_qst_starts_as_a_model_in_4_bits_and_keeps_its_codes() -> None:
    own = nn.ModuleDict({"blocks": nn.Sequential(in_table(), in_table()), "norm": nn.LayerNorm(128)})
    host = Chained(own["blocks"], own["norm"])
    x, other = torch.randn(2, 5, 128), torch.randn(3, 5, 128)
    options = {"example_inputs": (x,)}
    compiled = lorac.compile(host, {"side": lorac.QST.of(host, heads=2, r=8)}, **options)
    assert torch.equal(compiled(x), host(x))
    optimizer = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.1)
    goal, losses = torch.randn(2, 5, 128), []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append((compiled(x) - goal).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        emitted = lorac.compile(host, {"side": compiled.adapters["side"]}, target="onnxruntime", **options)
        found, _ = read_emitted(emitted)
        assert [node.op_type for node in found.graph.node].count("MatMulBnb4") == 4
        assert_close(emitted(other), compiled(other))
        assert not torch.equal(emitted(other), emitted(other, adapters=None))


class Chained(nn.Module):
    """Blocks, and a norm behind them."""

    def __init__(self, blocks: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.blocks, self.norm = blocks, norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.blocks(x))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("part", [{"compute_dtype": torch.bfloat16}, {"support_avx512bf16_for_cpu": True}])
def test_warns_where_4_bit_products_are_in_half_precision(part: dict[str, Any]) -> None:
    own = nn.Sequential(InTable(nn.Linear(128, 40)))
    vars(own[0]).update(part)
    with pytest.warns(LoracWarning, match=r"products with 1 weights of the model round their inputs \('0.weight'\)"):
        lorac.compile(own, target="onnxruntime", example_inputs=(torch.randn(3, 128),), self_test=False)


def compile_rounding(own: nn.Module, x: Tensor = X, **options: Any) -> tuple[Any, str]:
    """Return the compiled model, and the warning of its products."""
    with pytest.warns(LoracWarning) as said:
        compiled = lorac.compile(own, target="onnxruntime", example_inputs=(x,), **options)
    (text,) = [str(one.message) for one in said if "outputs differ by" in str(one.message)]
    return compiled, text


@torch.no_grad()
def test_measures_how_far_the_base_is_from_the_librarys_own() -> None:
    own = model(in_bitsandbytes)
    own.site.__class__ = RoundingLinear8bitLt
    expected = own(X)
    compiled, text = compile_rounding(own)
    share = float(torch.dist(compiled(X), expected) / expected.norm())
    (figure,) = re.findall(r"outputs differ by (\S+) of their norm on the example inputs", text)
    assert figure == f"{share:.1e}"
    assert "e-02" in figure or "e-03" in figure, "the rounding shows"
    assert torch.equal(own(X), expected), "the host is as it was"


@torch.no_grad()
def test_gives_no_figure_where_the_librarys_own_base_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    own = model(in_bitsandbytes)
    assert compile_rounding(own, self_test=False)[1].splitlines()[0].endswith("outputs differ by that rounding")
    monkeypatch.setattr(Linear8bitLt, "forward", None)  # a kernel that this machine lacks
    assert compile_rounding(own)[1].splitlines()[0].endswith("outputs differ by that rounding")


@torch.no_grad()
def test_warns_of_other_products_than_a_library_is_known_for() -> None:
    layer = InTable(nn.Linear(128, 40), compressed=False)
    layer.whole = layer.whole * 1.01
    text = compile_rounding(nn.Sequential(layer), torch.randn(5, 128))[1]
    assert "products with 1 weights of the model are not those with the float values ('0.weight')" in text
    assert re.search(r"outputs differ by \d\.\de-0\d of their norm on the example inputs", text)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes, which is not required"
)
@torch.no_grad()
def test_bitsandbytes_own_layer() -> None:
    import bitsandbytes

    plain = nn.Linear(128, 192)
    layer = bitsandbytes.nn.Linear4bit(128, 192, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(plain.state_dict())
    own, x = nn.Sequential(layer.to("cpu"), nn.Tanh()), torch.randn(5, 128)
    expected = own(x)
    rounds = layer.support_avx512bf16_for_cpu
    with pytest.warns(LoracWarning, match="round their inputs") if rounds else contextlib.nullcontext():
        compiled = lorac.compile(own, {}, target="onnxruntime", example_inputs=(x,))
    found, _ = read_emitted(compiled)
    assert [node.op_type for node in found.graph.node].count("MatMulBnb4") == 1
    assert_close(compiled(x), expected)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes, which is not required"
)
@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
@torch.no_grad()
def test_bitsandbytes_own_layers_answer_alike_after_every_compile_and_call(kind: str) -> None:
    """A call repacks a weight of 4 bits for some processors, and moves the scales of one of 8 bits."""
    import bitsandbytes

    def load() -> nn.Module:
        torch.manual_seed(0)
        plain = nn.Linear(128, 192)
        options: Any = {"quant_type": "nf4"} if kind == "Linear4bit" else {"has_fp16_weights": False}
        layer = getattr(bitsandbytes.nn, kind)(128, 192, **options)
        layer.load_state_dict(plain.state_dict())
        return nn.Sequential(layer.to("cpu"), nn.Tanh()).eval()

    own, x, adapters = load(), torch.randn(5, 128), {"a": lorac.LoRA(r=2, targets=["0"])}
    expected = load()(x)
    first = lorac.compile(own, adapters)
    assert torch.equal(first(x, adapters=None), expected)
    second = lorac.compile(own, adapters)
    assert not [key for key in first.state_dict() if "lora" not in key and "extra" not in key]
    for model in (own, lambda x: first(x, adapters=None), lambda x: second(x, adapters=None)):
        assert torch.equal(model(x), expected)
    assert first.load_state_dict(first.state_dict())


def test_rejects_codes_that_a_call_has_repacked() -> None:
    own = model(InTable)
    own.site.weight.quant_state.packing_format_for_cpu = True
    with refuses("capture_failed", match="compile it before it is called"):
        lorac.compile(own, target="onnxruntime", example_inputs=(X,))
