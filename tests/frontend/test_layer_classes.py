"""Layers with a forward of their own: an adapter acts there as PEFT's does, or is refused, on every target."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import lorac
from lorac.testing import assert_close
from tests import parity
from tests.peft_files import make_peft
from tests.refusing import refuses


class ScaledRows(nn.Embedding):
    """As Gemma's: PEFT scales its own part by the attribute too."""

    embed_scale = 3.0

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Product(nn.Linear):
    """As Falcon's: a linear layer without ``F.linear``."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Folded(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(0, -2).to(self.weight.dtype)).unflatten(0, x.shape[:-1]).to(x.dtype)


class Named(nn.Linear):
    def forward(self, x):
        return nn.Linear.forward(self, x)


class Convolved(nn.Conv1d):
    """As diffusers' LoRACompatibleConv."""

    def forward(self, x):
        return F.conv1d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Causal(nn.Conv1d):
    """As the convolutions of video autoencoders, at which PEFT's layer raises an error."""

    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x) + 1


class Bent(nn.Linear):
    def forward(self, x):
        return super().forward(torch.tanh(x))


class Clamped(nn.Linear):
    def forward(self, x):
        return (x @ self.weight.T).clamp(max=0.1)


class NamedAndScaled(nn.Linear):
    def forward(self, x):
        return 2 * nn.Linear.forward(self, x)


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Shifted(nn.Embedding):
    """As Bart's learned positions."""

    def forward(self, ids, past=0):
        return super().forward(ids + past + 2)


class NormedRows(nn.Embedding):
    """As Inkling's."""

    def forward(self, ids):
        return F.normalize(super().forward(ids), dim=-1)


class Standardised(nn.Conv1d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def _replaced():
    layer = nn.Linear(6, 5)
    layer.forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), layer)
    return layer


X, IDS = torch.linspace(-1, 1, 18).reshape(3, 6), torch.tensor([[0, 3], [5, 6]])
SIGNAL = torch.linspace(-1, 1, 48).reshape(2, 3, 8)
HOSTS = {
    "rows": (lambda: ScaledRows(7, 6), IDS),
    "product": (lambda: Product(6, 5), X),
    "folded": (lambda: Folded(6, 5), X),
    "named": (lambda: Named(6, 5), X),
    "convolved": (lambda: Convolved(3, 4, 3, stride=2, padding=1), SIGNAL),
}
CHANGING = {
    "scaled": (lambda: Scaled(6, 5), X),
    "bent": (lambda: Bent(6, 5), X),
    "clamped": (lambda: Clamped(6, 5), X),
    "named and scaled": (lambda: NamedAndScaled(6, 5), X),
    "called": (lambda: Called(6, 5), X),
    "shifted": (lambda: Shifted(9, 6), IDS),
    "normed": (lambda: NormedRows(7, 6), IDS),
    "standardised": (lambda: Standardised(3, 4, 3), SIGNAL),
    "replaced": (_replaced, X),
}


def host(make):
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("site", make())
    return model.eval()


def trained(model, spread=0.12):
    adapter = lorac.compile(model, {"a": lorac.LoRA(r=2, alpha=2, targets=("site",))}).adapters["a"]
    for name, tensor in adapter.tensors["site"].items():
        with torch.no_grad():
            tensor.normal_(0, spread, generator=torch.Generator().manual_seed(len(name)))
    return adapter


@torch.no_grad()
@pytest.mark.parametrize("name", HOSTS)
def test_adapts_layers_whose_output_a_change_is_added_to(name, tmp_path):
    make, x = HOSTS[name]
    model = host(make)
    oracle = make_peft(model, tmp_path, LoraConfig(r=2, target_modules=["site"]), inputs={"input": x})
    expected, base = oracle(x), model(x)
    live = lorac.compile(model, {"a": tmp_path})
    parity.assert_parity(live(x), expected, base)
    parity.assert_parity(lorac.compile(model, {"a": tmp_path}, mode="baked")(x), expected, base)
    emitted = lorac.compile(model, {"a": tmp_path}, target="onnxruntime", mode="live", example_inputs=(x,))
    parity.assert_parity(emitted(x), expected, base)
    live.swap(None)
    assert torch.equal(live(x), base)
    assert torch.equal(live(x, adapters="a"), lorac.compile(model, {"a": tmp_path})(x))


@torch.no_grad()
def test_live_matches_merged_where_pefts_layer_raises():
    model = host(lambda: Causal(3, 4, 3))
    adapter = trained(model)
    merged, base = lorac.compile(model, {"a": adapter}, mode="baked")(SIGNAL), model(SIGNAL)
    for target in ("eager", "onnxruntime"):
        live = lorac.compile(model, {"a": adapter}, target=target, mode="live", example_inputs=(SIGNAL,))
        parity.assert_parity(live(SIGNAL), merged, base)


def test_its_attributes_are_the_modules():
    """What is set on the module later, its mode and its parameters too, is what the class's own forward reads."""

    class Chosen(nn.Linear):
        factor = 1.0

        def forward(self, x):
            return self.factor * super().forward(x) * (2 if self.training else 1)

    model, x = host(lambda: Chosen(6, 5)), X
    live = lorac.compile(model, {"a": trained(model)})
    before = live(x)
    live.host.site.factor = 5.0
    assert_close(live(x), 5 * before)
    assert_close(live.train()(x), 10 * before)


@torch.no_grad()
def test_accepts_a_layer_with_further_arguments():
    class Compatible(nn.Linear):
        """As diffusers' LoRACompatibleLinear."""

        def forward(self, x, scale=1.0):
            return super().forward(x)

    model = nn.ModuleDict({"site": host(lambda: Compatible(6, 5)).site})
    live = lorac.compile(model, {"a": trained(model)})
    merged = lorac.compile(model, {"a": live.adapters["a"]}, mode="fused")
    parity.assert_parity(live.host.site(X, scale=0.5), merged.host.site(X, scale=0.5), model.site(X, scale=0.5))


def adapted(name):
    """Return a host, an input, and a PeftModel with an adapter at the layer."""
    make, x = CHANGING[name]
    model = host(make)
    config = LoraConfig(r=2, target_modules=["site"], init_lora_weights=False)
    return model, x, get_peft_model(copy.deepcopy(model), config).eval()


@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize("name", CHANGING)
def test_rejects_layers_that_change_their_input_or_output(name, target, mode):
    model, x, wrapped = adapted(name)
    for given in ((model, {"a": lorac.LoRA(r=2, targets=("site",))}), (wrapped,)):
        with refuses("site_unsupported", match="the forward of 'site', a .*, changes inputs or outputs of the layer"):
            lorac.compile(*given, mode=mode, target=target, example_inputs=(x,))


def test_rejects_a_file_and_an_adapter_that_is_added(tmp_path):
    model, x, wrapped = adapted("scaled")
    wrapped.save_pretrained(tmp_path)
    with refuses("site_unsupported", match="the forward of 'site'"):
        lorac.compile(model, {"a": tmp_path})
    compiled = lorac.compile(model, {"full": lorac.Full(targets=("site",))})
    with refuses("site_unsupported", match="the forward of 'site'"):
        compiled.add_adapter(tmp_path, "late")
    assert list(compiled.adapters) == ["full"]
    with refuses("site_unsupported", match="the forward of 'site'"):
        lorac.compile(model, reserve=lorac.Reserve(targets=["site"]), example_inputs=(x,))


@torch.no_grad()
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize("name", ["scaled", "shifted", "standardised", "replaced"])
def test_keeps_their_forward_where_no_adapter_acts(name, target):
    make, x = CHANGING[name]
    model = host(make).append(nn.Linear(make()(x).shape[-1], 4))
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=("1",))}, target=target, example_inputs=(x,))
    assert_close(compiled(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_replaces_their_weight_whole(target):
    """As ``modules_to_save`` does: PEFT calls a copy of the layer."""
    model = host(CHANGING["scaled"][0])
    full = lorac.Adapter("f", lorac.Full(targets=("site",)), {"site": {"weight": torch.linspace(-1, 1, 30).view(5, 6)}})
    compiled = lorac.compile(model, [full], target=target, example_inputs=(X,))
    changed = copy.deepcopy(model)
    changed.site.weight.copy_(full.tensors["site"]["weight"])
    assert_close(compiled(X), changed(X))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@torch.no_grad()
def test_gemmas_scaled_embedding_is_pefts(tmp_path):
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    model = transformers.Gemma3ForCausalLM(config).double().eval()
    ids = {"input_ids": torch.arange(3, 13).reshape(2, 5)}
    base = model(**ids).logits
    theirs = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False))
    for name, tensor in theirs.named_parameters():
        if "lora_embedding" in name:
            tensor.normal_(0, 0.04, generator=torch.Generator().manual_seed(len(name)))
    expected = theirs.eval()(**ids).logits
    theirs.save_pretrained(tmp_path)
    ours = lorac.compile(theirs.unload(), {"a": str(tmp_path)})
    parity.assert_parity(ours(**ids).logits, expected, base)
