"""Layers whose weight another module reads: observed in a whole call, and adapted where they are called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import lorac
from lorac.frontend.host import Host
from lorac.frontend.weight_reads import observe_example
from lorac.testing import assert_close
from tests import parity
from tests.peft_files import make_peft
from tests.refusing import refuses

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
SETTINGS = [(target, mode) for target in ("eager", "onnxruntime") for mode in ("live", "fused", "baked")]


def _use_weight(x: Tensor, layer: nn.Module) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _read_by_local_name(model: nn.Module, x: Tensor) -> Tensor:
    layer = model.qkv
    return F.linear(x, layer.weight, layer.bias)


def _read_parts(model: nn.Module, x: Tensor) -> Tensor:
    first, second = model.qkv.weight.split(3)
    return torch.cat([x @ first.t(), x @ second.t()], -1) + model.qkv.bias


SPELLINGS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "attribute": lambda model, x: F.linear(x, model.qkv.weight, model.qkv.bias),
    "local name": _read_by_local_name,
    "getattr": lambda model, x: F.linear(x, getattr(model, "q" + "kv").weight, getattr(model, "q" + "kv").bias),
    "function": lambda model, x: _use_weight(x, model.qkv),
    "parameters": lambda model, x: F.linear(x, next(model.qkv.parameters())),
    "modules": lambda model, x: _use_weight(x, model._modules["qkv"]),
    "parts": _read_parts,
}


class Reader(nn.Module):
    """It multiplies by a layer's weight, as swin's attention does, and calls another whose dtype it asks for.

    Args:
        spelling: how it comes to the weight.
        calls: whether it calls the layer as well as it reads it.
    """

    def __init__(self, spelling: str = "attribute", calls: bool = False) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 6), nn.Linear(6, 5)
        self.spelling, self.calls = spelling, calls

    def forward(self, x: Tensor) -> Tensor:
        y = SPELLINGS[self.spelling](self, x) + (self.qkv(x) if self.calls else 0)
        return self.out(torch.tanh(y).to(self.out.weight.data.dtype))


class Choosing(Reader):
    """It reads the weight or calls the layer, as timm's swinv2 does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.qkv(x) if self.calls else F.linear(x, self.qkv.weight, self.qkv.bias)))


def _make(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = {"calling": Choosing(calls=True), "reading and calling": Reader("local name", calls=True)}
    return (made.get(name) or Reader(name)).eval()


@torch.no_grad()
@pytest.mark.parametrize(("target", "mode"), SETTINGS)
@pytest.mark.parametrize("name", [*SPELLINGS, "calling", "reading and calling"])
def test_acts_on_calls_alone_as_pefts_layer_does(name: str, target: str, mode: str, tmp_path: Path) -> None:
    model = _make(name)
    oracle = make_peft(model, tmp_path, LoraConfig(r=2, target_modules=["qkv", "out"]), inputs={"x": X})
    with _warns() if name in SPELLINGS else contextlib.nullcontext():
        compiled = lorac.compile(model, {"a": tmp_path}, target=target, mode=mode, example_inputs=(X,))
    parity.assert_parity(compiled(X), oracle(X), model(X))
    if mode == "baked":
        return
    compiled.swap(None)
    assert_close(compiled(X), model(X))
    compiled.swap("a")
    parity.assert_parity(compiled(X), oracle(X), model(X))


def _warns() -> contextlib.AbstractContextManager[object]:
    return pytest.warns(lorac.LoracWarning, match="no effect at 'qkv', whose weights the model only reads")


@torch.no_grad()
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
@pytest.mark.parametrize("name", [*SPELLINGS, "calling", "reading and calling"])
def test_observes_the_first_call_without_example_inputs(name: str, mode: str, tmp_path: Path) -> None:
    model = _make(name)
    oracle = make_peft(model, tmp_path, LoraConfig(r=2, target_modules=["qkv", "out"]), inputs={"x": X})
    compiled = lorac.compile(model, {"a": tmp_path}, mode=mode)
    with _warns() if name in SPELLINGS else contextlib.nullcontext():
        first = compiled(X)
    parity.assert_parity(first, oracle(X), model(X))
    assert torch.equal(compiled(X), first)


@pytest.mark.parametrize(("target", "mode"), SETTINGS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rejects_an_adapter_that_acts_nowhere(spelling: str, target: str, mode: str) -> None:
    adapter = lorac.LoRA(r=2, targets=["qkv"])
    with refuses("site_unreached", match="adapter 'lora' has no effect: it acts on 'qkv'"):
        lorac.compile(Reader(spelling), [adapter], target=target, mode=mode, example_inputs=(X,))


@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_rejects_it_in_each_first_call_without_example_inputs(spelling: str, mode: str) -> None:
    compiled = lorac.compile(Reader(spelling), [lorac.LoRA(r=2, targets=["qkv"])], mode=mode)
    for _ in range(2):
        with refuses("site_unreached", match="adapter 'lora' has no effect: it acts on 'qkv'"):
            compiled(X)


def test_rejects_an_adapter_that_is_added_and_acts_nowhere() -> None:
    with _warns():
        compiled = lorac.compile(Reader(), [lorac.LoRA(r=2, targets=["qkv", "out"])], example_inputs=(X,))
    with refuses("site_unreached", match="adapter 'b' has no effect: it acts on 'qkv'"):
        compiled.add_adapter(lorac.LoRA(r=2, targets=["qkv"]), "b")


@torch.no_grad()
@pytest.mark.parametrize(("target", "mode"), SETTINGS)
def test_names_the_layers_of_one_component_if_an_adapter_acts_in_another(target: str, mode: str) -> None:
    models = {"one": Reader().eval(), "two": Reader(calls=True).eval()}
    factors = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(6, 1)}
    paths = ["one.qkv", "two.qkv"]
    adapter = lorac.Adapter("a", lorac.LoRA(r=1, targets=paths), dict.fromkeys(paths, factors))
    inputs = {"one": (X,), "two": (X,)}
    with pytest.warns(lorac.LoracWarning, match="no effect at 'one.qkv', whose weights the model only reads"):
        compiled = lorac.compile(models, {"a": adapter}, target=target, mode=mode, example_inputs=inputs)
    assert_close(compiled["one"](X), models["one"](X))
    assert (compiled["two"](X) - models["two"](X)).abs().max() > 0.1


class Routing(nn.Module):
    """It sends rows to one of two experts, and its head's weight is that of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, ids: Tensor, scores: bool = True) -> Tensor:
        x = self.experts[int(ids[0, 0] > 4)](self.embed(ids))
        return self.head(x) if scores else x


@torch.no_grad()
def test_allows_layers_that_a_call_neither_reads_nor_calls() -> None:
    compiled = lorac.compile(
        Routing(), {"a": lorac.LoRA(r=1, targets=["experts.1"]), "b": lorac.LoRA(r=1, targets=["head"])}
    )
    for adapter in ("a", "b"):
        compiled.swap(adapter)
        compiled(torch.zeros(1, 3, dtype=torch.long), scores=False)


def test_observes_the_layers_of_other_libraries() -> None:
    attention = nn.MultiheadAttention(4, 2)
    reads = observe_example(Host.of(attention), ["out_proj"], (X, X, X))
    assert reads is not None
    assert (reads.read, reads.called) == ({"out_proj"}, set())
    torchvision = pytest.importorskip("torchvision.models.swin_transformer")
    attention = torchvision.ShiftedWindowAttention(8, [2, 2], [0, 0], 2)
    reads = observe_example(Host.of(attention), ["qkv"], (torch.randn(1, 4, 4, 8),))
    assert reads is not None
    assert (reads.read, reads.called) == ({"qkv"}, set())


@torch.no_grad()
def test_merged_weights_move_with_a_baked_model() -> None:
    model = Choosing(calls=True)
    adapter = lorac.compile(model, [lorac.LoRA(r=2, targets=["qkv"])], example_inputs=(X,)).adapters["lora"]
    adapter.tensors["qkv"]["lora_B"].normal_()
    compiled = lorac.compile(model, [adapter], mode="baked", example_inputs=(X,))
    assert isinstance(compiled, nn.Module)
    before = compiled(X)
    assert_close(compiled.double()(X.double()).float(), before)


class Sentence(PreTrainedModel):
    """A model of transformers, for which lorac makes example inputs; it reads a layer's weight."""

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.embed, self.reader = nn.Embedding(config.vocab_size, 4), Reader("local name")
        self.post_init()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.reader(self.embed(input_ids))


def test_merges_nothing_into_weights_that_are_only_read() -> None:
    model = Sentence(PretrainedConfig(vocab_size=9))
    tensors = {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(6, 1)}
    both = {"reader.qkv": tensors, "reader.out": {"lora_A": torch.ones(1, 6), "lora_B": torch.ones(5, 1)}}
    adapter = lorac.Adapter("a", lorac.LoRA(r=1, targets=["qkv", "out"]), both)
    with pytest.warns(lorac.LoracWarning, match=r"no effect at 'reader.qkv'.*nothing is merged there"):
        merged = lorac.merge_into(model, adapter)
    assert torch.equal(merged.reader.qkv.weight, model.reader.qkv.weight)
    assert not torch.equal(merged.reader.out.weight, model.reader.out.weight)
    alone = lorac.Adapter("a", lorac.LoRA(r=1, targets=["qkv"]), {"reader.qkv": tensors})
    with refuses("site_unreached", match="there is nothing to merge"):
        lorac.merge_into(model, alone)
