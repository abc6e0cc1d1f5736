"""Layers that compute their weight at each call: parametrizations, and the hooks of weight_norm and its kin."""

import warnings

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.utils import parametrizations, prune

import lorac
from lorac.testing import assert_close, assert_parity
from tests.peft_files import make_peft
from tests.refusing import refuses


class Positive(nn.Module):
    """A parametrization of somebody's own, with a layer in it."""

    def __init__(self, width):
        super().__init__()
        self.mixing = nn.Linear(width, width)

    def forward(self, weight):
        return self.mixing(weight).exp() / 10


class Computing(nn.Module):
    """A convolution and a linear layer; ``how`` computes the weights of both."""

    def __init__(self, how, groups):
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=groups)
        self.head = nn.Linear(6, 5)
        HOW[how](self)

    def forward(self, x):
        return self.head(self.conv(x).transpose(1, 2))


def _parametrized(model):
    parametrizations.weight_norm(model.conv, dim=2)
    parametrizations.spectral_norm(model.head)


def _own(model):
    torch.nn.utils.parametrize.register_parametrization(model.head, "weight", Positive(6))
    torch.nn.utils.parametrize.register_parametrization(model.head, "bias", nn.Tanh())


def _hooked(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model.conv, dim=2)
        nn.utils.spectral_norm(model.head)
    with torch.no_grad():
        model.conv.weight_g.mul_(1.5)  # as of a state dict that was loaded: the weight set last is old


def _pruned(model):
    prune.random_unstructured(model.conv, "weight", 0.3)
    prune.l1_unstructured(model.head, "bias", 0.5)


HOW = {"parametrized": _parametrized, "own": _own, "hooked": _hooked, "pruned": _pruned}


def made(how, groups=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Computing(how, groups)
        with torch.no_grad():  # the norms' scales leave those of the weights
            for name, parameter in model.named_parameters():
                parameter.mul_(1.2 if name.endswith(("_g", "original0")) else 1.0)
        return model.eval(), torch.randn(2, 6, 4)


def everything(model):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return values, [(name, type(m), sorted(vars(m))) for name, m in model.named_modules()]


def assert_untouched(model, before):
    values, modules = everything(model)
    assert modules == before[1]
    assert values.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][name]) for name, value in values.items())


def peft_of(model, folder, x):
    config = LoraConfig(r=4, target_modules=["conv", "head"], lora_alpha=3)
    return make_peft(model, folder, config, inputs={"x": x})


@pytest.mark.medium(
    "each kind of computed weight in one mode", keep=["parametrized-live", "hooked-fused", "pruned-baked"]
)
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
@pytest.mark.parametrize("how", HOW)
@torch.no_grad()
def test_answers_as_peft_does(how, mode, tmp_path):
    model, x = made(how, groups=2 if mode == "live" else 1)  # PEFT's adapter of a grouped one cannot be merged
    oracle = peft_of(model, tmp_path / "a", x)
    base, before = model(x), everything(model)
    for target in ("eager",) if how in ("own", "pruned") else ("eager", "onnxruntime"):
        compiled = lorac.compile(model, {"a": tmp_path / "a"}, target=target, mode=mode, example_inputs=(x,))
        assert_untouched(model, before)
        assert_close(compiled(x), oracle(x))
        if mode != "baked":
            own = compiled(x, adapters=None)
            assert torch.equal(own, base) if target == "eager" else assert_close(own, base) is None
            assert_parity(compiled(x[:1]), oracle(x[:1]), base[:1], own_base=own[:1])


@pytest.mark.parametrize("how", HOW)
def test_sites_show_the_weight_that_acts_and_ask_without_a_trace(how):
    model, x = made(how)
    model.train()  # spectral norms write into their buffers when they are asked
    before = everything(model)
    sites = lorac.sites(model)
    assert [path for path, site in sites.items() if site.kind != "block"] == ["conv", "head"]
    compiled = lorac.compile(model, lorac.LoRA(r=2, targets=("conv", "head")))
    assert_untouched(model, before)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        for path, site in sites.items():
            assert torch.equal(compiled.session.base.weight(site), site.present(model.get_submodule(path).weight))
        assert torch.equal(compiled.eval()(x, adapters=None), expected)


@pytest.mark.parametrize("how", ["parametrized", "hooked"])
def test_trains_as_peft_does(how, tmp_path):
    model, x = made(how)
    oracle = peft_of(model, tmp_path / "a", x)
    for name, parameter in oracle.named_parameters():
        parameter.requires_grad_("lora_" in name)
    compiled = lorac.compile(model, {"a": tmp_path / "a"})
    (oracle(x).square().sum()).backward()
    (compiled(x).square().sum()).backward()
    for path in ("conv", "head"):
        theirs = oracle.base_model.model.get_submodule(path)
        for name, tensor in compiled.adapters["a"].tensors[path].items():
            wanted = getattr(theirs, name)["default"].weight.grad
            assert_close(tensor.grad, wanted.reshape(tensor.shape))


@pytest.mark.medium("session/test_artifact.py, and the answers of computed weights")
def test_an_adapter_is_stored_and_an_artifact_kept(tmp_path):
    model, x = made("parametrized")
    adapter = lorac.testing.adapter_away(lorac.DoRA(r=2, targets=("head",)), model, x, name="a", seed=1)
    compiled = lorac.compile(model, {"a": adapter}, target="onnxruntime", example_inputs=(x,))
    compiled.save(tmp_path / "artifact")
    with torch.no_grad():
        assert torch.equal(lorac.load(tmp_path / "artifact")(x), compiled(x))
        lorac.save_adapter(compiled.adapters["a"], tmp_path / "a", model=model)
        again = lorac.compile(model, {"a": tmp_path / "a"}, target="onnxruntime", example_inputs=(x,))
        assert torch.equal(again(x), compiled(x))


@pytest.mark.parametrize("how", ["parametrized", "hooked"])
def test_rejects_a_saved_layer_whose_weight_is_computed(how, tmp_path):
    model, x = made(how)
    config = LoraConfig(r=2, target_modules=["conv"], modules_to_save=["head"])
    with torch.no_grad():
        make_peft(model, tmp_path, config, inputs={"x": x})
    with refuses("unsupported_field", match=r"trains 'head\..*', and 'head' computes its weight from it"):
        lorac.compile(model, {"a": tmp_path})
    fresh = lorac.compile(model, {"a": lorac.LoRA(targets=("conv",), modules_to_save=("head",))})
    assert sorted(fresh.adapters["a"].replaced) == ["head.bias", "head.weight"]
