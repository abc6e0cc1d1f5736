"""Convolutions of every padding: "valid", "same", numbers, and every mode, against the merged kernel and PEFT."""

import copy
import itertools

import pytest
import torch
from peft import HiraConfig, IA3Config, LoHaConfig, LoraConfig
from torch import nn

import lorac
from lorac.testing import assert_close, assert_parity
from tests.limits import assert_apart
from tests.peft_files import load_peft, make_peft
from tests.refusing import refuses

CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
MODES = ("zeros", "reflect", "replicate", "circular")
PADDINGS = {"valid": "valid", "same": "same", "number": 1, "uneven": (2, 0, 1)}
EVEN = "ignore:Using padding='same' with even kernel lengths"


class One(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.site = conv

    def forward(self, x):
        return self.site(x)


def made(axes, padding, mode="zeros", groups=1, kernel=(2, 3, 2), **more):
    """A convolution, and an input."""
    padding = padding[:axes] if isinstance(padding, tuple) else padding
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        conv = CLASSES[axes - 1](4, 6, kernel[:axes], padding=padding, padding_mode=mode, groups=groups, **more)
        return One(conv).double().eval(), torch.randn(2, 4, *(5, 6, 4)[:axes], dtype=torch.float64)


def adapter_of(model, x, groups=1):
    return lorac.testing.adapter_away(lorac.LoRA(r=2 * groups, targets=("site",)), model, x, name="a", seed=1)


def merged(model, adapter):
    """The model with W + s·B·A in its kernel."""
    changed, site = copy.deepcopy(model), lorac.sites(model)["site"]
    at, s = adapter.tensors["site"], adapter.variant.alpha / adapter.variant.r
    with torch.no_grad():
        weight = site.present(model.site.weight) + s * at["lora_B"] @ at["lora_A"]
        changed.site.weight.copy_(site.store(weight))
    return changed


@pytest.mark.medium("two paddings; uneven paddings", keep=["uneven"])
@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
@torch.no_grad()
def test_a_branch_matches_the_merged_kernel(padding):
    for axes, mode in itertools.product((1, 2, 3), MODES):
        model, x = made(axes, padding, mode)
        adapter = adapter_of(model, x)
        expected, base = merged(model, adapter)(x), model(x)
        for how in ("live", "fused"):
            compiled = lorac.compile(model, {"a": adapter}, mode=how)
            assert_parity(compiled(x), expected, base)
            assert torch.equal(compiled(x, adapters=None), base)


@pytest.mark.medium("two dimensions", keep=["2-reflect"])
@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize(
    ("axes", "mode"), [(1, "circular"), (2, "reflect"), (2, "circular"), (3, "replicate")], ids=str
)
@torch.no_grad()
def test_onnxruntime_pads_as_eager(axes, mode, tmp_path):
    model, x = made(axes, "same", mode, groups=2)
    model, x = model.float(), x.float()
    adapter = adapter_of(model.double(), x.double(), groups=2)
    model.float()
    eager = lorac.compile(model, {"a": adapter})
    emitted = lorac.compile(model, {"a": adapter}, target="onnxruntime", example_inputs=(x,))
    for inputs in (x, torch.cat([x, -2 * x])):
        assert_parity(emitted(inputs), eager(inputs), model(inputs), own_base=emitted(inputs, adapters=None))
    emitted.save(tmp_path / "artifact")
    assert torch.equal(lorac.load(tmp_path / "artifact")(x), emitted(x))


CONFIGS = {
    "lora": LoraConfig(r=2, target_modules=["site"]),
    "lora_bias": LoraConfig(r=2, target_modules=["site"], lora_bias=True, bias="lora_only"),
    "dora": LoraConfig(r=2, target_modules=["site"], use_dora=True),
    "hira": HiraConfig(r=2, target_modules=["site"]),
    "loha": LoHaConfig(r=2, target_modules=["site"]),
}


@pytest.mark.medium(
    "a method within the kernel, one next to it, one with bias", keep=["valid-dora", "same-lora_bias", "same-hira"]
)
@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("padding", ["valid", "same"])
@torch.no_grad()
def test_matches_peft(name, padding, tmp_path):
    for axes in (2,) if name == "loha" else (1, 2, 3):
        model, x = made(axes, padding)
        folder = tmp_path / str(axes)
        oracle = make_peft(model, folder, CONFIGS[name], inputs={"x": x})
        assert_parity(lorac.compile(model, {"a": folder})(x), oracle(x), model(x))
        lorac.save_adapter(lorac.load_adapter(folder, model), tmp_path / f"back{axes}", model=model)
        assert torch.equal(load_peft(model, tmp_path / f"back{axes}")(x), oracle(x))


@pytest.mark.parametrize("mode", MODES[1:])
@torch.no_grad()
def test_warns_that_peft_pads_with_zeros_before_it_merges(mode, tmp_path):
    """Its A has no padding mode: lorac computes what PEFT merges, and says that the borders differ before."""
    model, x = made(2, 1, mode, kernel=(3, 3))
    oracle = make_peft(model, tmp_path, CONFIGS["lora"], inputs={"x": x})
    with pytest.warns(lorac.LoracWarning, match=f"'site' pads by '{mode}', and PEFT's LORA pads with zeros"):
        compiled = lorac.compile(model, {"a": tmp_path})
    inner = (..., slice(1, -1), slice(1, -1))
    assert_close(compiled(x)[inner], oracle(x)[inner])
    assert_apart(compiled(x), oracle(x))
    assert_parity(compiled(x), oracle.merge_and_unload()(x), model(x))


@torch.no_grad()
def test_ia3_scales_the_input_before_padding(tmp_path):
    """PEFT's (IA)³ calls the convolution itself: nothing to warn of."""
    model, x = made(2, 1, "circular", kernel=(3, 3))
    config = IA3Config(target_modules=["site"], feedforward_modules=[])
    oracle = make_peft(model, tmp_path, config, inputs={"x": x})
    assert_parity(lorac.compile(model, {"a": tmp_path})(x), oracle(x), model(x))


def test_pefts_lora_does_not_dilate(tmp_path):
    """Under "same" it runs, and computes what is no change of the kernel: refused, there and back."""
    model, x = made(2, "same", kernel=(3, 3), dilation=2)
    make_peft(model, tmp_path / "theirs", CONFIGS["lora"], inputs={"x": x})
    with refuses("site_unsupported", match="'site' is a dilated convolution, and PEFT's lora_A"):
        lorac.load_adapter(tmp_path / "theirs", model)
    adapter = adapter_of(model, x)
    with refuses("site_unsupported", match="dilated convolution"):
        lorac.save_adapter(adapter, tmp_path / "ours", model=model)
    with torch.no_grad():
        assert_parity(lorac.compile(model, {"a": adapter})(x), merged(model, adapter)(x), model(x))


def test_lists_no_site_for_layers_that_peft_does_not_adapt():
    """PEFT 0.21 has no tuner for transposed convolutions, bilinear layers or bags of embeddings."""
    others = {
        **{
            f"up{n}": cls(2, 3, 2) for n, cls in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
        },
        "pair": nn.Bilinear(2, 3, 4),
        "bag": nn.EmbeddingBag(5, 3),
    }
    assert lorac.sites(nn.ModuleDict(others)) == {}
    for name, module in others.items():
        model = nn.ModuleDict({name: module, "line": nn.Linear(2, 3)})
        with refuses("site_not_found", match=f"targets '{name}', which matches no site"):
            lorac.compile(model, {"a": lorac.LoRA(r=1, targets=(name,))})
