"""Layers of custom classes: an adapter acts on the weight, below the class's own ops, on every target."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import lorac
from lorac.testing import assert_close
from tests import parity
from tests.refusing import refuses


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x) + 1


class ScaledRows(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class Product(nn.Linear):
    """As Falcon's: a linear layer without ``F.linear``."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Clamped(nn.Linear):
    def forward(self, x):
        return (x @ self.weight.T).clamp(max=0.1)


class Shifted(nn.Embedding):
    """As Bart's learned positions: it takes other arguments than its layer does."""

    def forward(self, ids, past=0):
        return super().forward(ids + past + 2)


HOSTS = {
    "scaled": (lambda: Scaled(6, 5), torch.linspace(-1, 1, 18).reshape(3, 6)),
    "rows": (lambda: ScaledRows(7, 6), torch.tensor([[0, 3], [5, 6]])),
    "product": (lambda: Product(6, 5), torch.linspace(-1, 1, 18).reshape(3, 6)),
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


@pytest.mark.medium("products", keep=["product"])
@pytest.mark.parametrize("name", HOSTS)
def test_live_matches_merged(name):
    make, x = HOSTS[name]
    model = host(make)
    adapter = trained(model, 0.2 if name == "rows" else 0.12)
    merged, base = lorac.compile(model, {"a": adapter}, mode="baked")(x), model(x)
    live = lorac.compile(model, {"a": adapter})
    parity.assert_parity(live(x), merged, base)
    with torch.no_grad():
        parity.assert_parity(live(x), merged, base)
        emitted = lorac.compile(model, {"a": adapter}, target="onnxruntime", mode="live", example_inputs=(x,))
        parity.assert_parity(emitted(x), merged, base)
        live.swap(None)
        assert torch.equal(live(x), base)
        assert torch.equal(live(x, adapters="a"), lorac.compile(model, {"a": adapter})(x))


def test_its_attributes_are_the_modules():
    """What is set on the module later, its mode and its parameters too, is what the class's own forward reads."""

    class Chosen(nn.Linear):
        factor = 1.0

        def forward(self, x):
            return self.factor * super().forward(x) * (2 if self.training else 1)

    model, x = host(lambda: Chosen(6, 5)), HOSTS["scaled"][1]
    live = lorac.compile(model, {"a": trained(model)})
    before = live(x)
    live.host.site.factor = 5.0
    assert_close(live(x), 5 * before)
    assert_close(live.train()(x), 10 * before)


@torch.no_grad()
def test_accepts_a_layer_with_further_arguments():
    model, ids = host(lambda: Shifted(9, 6)).site, torch.tensor([[0, 3], [1, 2]])
    model = nn.ModuleDict({"site": model})
    live = lorac.compile(model, {"a": trained(model, 0.3)})
    merged = lorac.compile(model, {"a": live.adapters["a"]}, mode="fused")
    parity.assert_parity(live.host.site(ids, past=1), merged.host.site(ids, past=1), model.site(ids, past=1))


@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_rejects_layers_with_a_forward_of_their_own(target, mode):
    model, x = host(lambda: Clamped(6, 5)), HOSTS["scaled"][1]
    with refuses("site_unsupported", match="'site' is a Clamped") as error:
        lorac.compile(model, {"a": lorac.LoRA(r=2, targets=("site",))}, mode=mode, target=target, example_inputs=(x,))
    assert "super().forward" in str(error.value)


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
