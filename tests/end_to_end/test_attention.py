"""nn.MultiheadAttention: its packed projection and its output layer, which torch's module reads in its own forward."""

import copy

import pytest
import torch
import torchvision
import transformers
from peft import LoraConfig
from torch import nn

import lorac
from lorac import load_adapter, save_adapter
from lorac.testing import adapter_away, assert_close, assert_parity
from tests.peft_files import configure, load_peft, make_peft
from tests.refusing import refuses

WIDTH = 8


class Attending(nn.Module):
    """Attention of queries to keys and values, called in one of the ways there are."""

    def __init__(self, call="self", **options):
        super().__init__()
        self.call = call
        self.attn = nn.MultiheadAttention(WIDTH, 2, **options)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, other):
        first = self.attn.batch_first
        x, other = (t if first else t.transpose(0, 1) for t in (x, other))
        y = self.head(getattr(self, f"_{self.call}")(x, other))
        return y if first else y.transpose(0, 1)

    def _self(self, x, _):
        return self.attn(x, x, x, need_weights=False)[0]

    def _cross(self, x, other):
        return self.attn(x, other, other, need_weights=False)[0]

    def _apart(self, x, other):
        return self.attn(x, other, 2 * other)[0]

    def _weights(self, x, _):
        y, weights = self.attn(x, x, x)
        return y + weights.sum()

    def _masked(self, x, _):
        length = x.shape[1 if self.attn.batch_first else 0]
        causal = torch.triu(torch.full((length, length), float("-inf"), dtype=x.dtype), 1)
        return self.attn(x, x, x, attn_mask=causal, need_weights=False)[0]

    def _padded(self, x, other):
        padding = other[..., 0] > 1 if self.attn.batch_first else (other[..., 0] > 1).t()
        return self.attn(x, x, x, key_padding_mask=padding[:, : x.shape[1]], need_weights=False)[0]


HOSTS = {
    "self": {"batch_first": True},
    "cross": {},
    "apart": {"batch_first": True, "bias": False},
    "weights": {},
    "masked": {"batch_first": True},
    "padded": {"batch_first": True},
}


def made(call="self", **options):
    """A model and two inputs, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Attending(call, **(HOSTS[call] | options))
        for name, parameter in model.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)
        return model.double().eval(), tuple(torch.randn(2, 5, WIDTH, dtype=torch.float64) for _ in range(2))


def adapter_of(model, inputs, variant, name="a"):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, both):
            return self.inner(*both)

    one = One()
    made = adapter_away(variant, one, torch.stack(inputs), name=name, seed=len(name))
    tensors = {path.removeprefix("inner."): at for path, at in made.tensors.items()}
    return lorac.Adapter(name, variant, tensors)


@pytest.fixture
def by_layers():
    """PEFT's own answer, which torch's fused kernels pass by."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


CONFIG = LoraConfig(r=3, lora_alpha=5, target_modules=["attn"], lora_dropout=0.1)


@pytest.mark.medium("attention to itself and to another sequence, and a mask", keep=["self", "cross", "masked"])
@pytest.mark.parametrize("call", HOSTS)
@torch.no_grad()
def test_matches_peft(call, tmp_path, by_layers):
    model, inputs = made(call)
    oracle = make_peft(model, tmp_path / "theirs", CONFIG, inputs=dict(zip(("x", "other"), inputs, strict=True)))
    expected, base = oracle(*inputs), model(*inputs)
    for mode in ("live", "fused", "baked"):
        compiled = lorac.compile(model, {"a": tmp_path / "theirs"}, mode=mode)
        assert_parity(compiled(*inputs), expected, base)
    assert_parity(copy.deepcopy(oracle).merge_and_unload()(*inputs), expected, base)


@pytest.mark.medium("every bias", keep=["all"])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@torch.no_grad()
def test_round_trips_through_peft(bias, tmp_path, by_layers):
    model, inputs = made()
    given = dict(zip(("x", "other"), inputs, strict=True))
    config = LoraConfig(r=2, target_modules=["attn", "head"], bias=bias, use_rslora=True, rank_pattern={"head": 1})
    oracle = make_peft(model, tmp_path / "theirs", config, inputs=given)
    read = load_adapter(tmp_path / "theirs", model)
    assert list(read.tensors) == ["attn", "attn.out_proj", "head"]
    save_adapter(read, tmp_path / "known", model=model)
    save_adapter(load_adapter(tmp_path / "theirs"), tmp_path / "alone")
    assert_parity(lorac.compile(model, {"a": read})(*inputs), oracle(*inputs), model(*inputs))
    named = lorac.Adapter(
        "x", lorac.LoRA(r=2, targets=("attn", "out_proj")), {p: read.tensors[p] for p in ("attn", "attn.out_proj")}
    )
    save_adapter(named, tmp_path / "named", model=model)
    for name in ("known", "alone"):
        assert torch.equal(load_peft(model, tmp_path / name)(*inputs), oracle(*inputs))
    assert_parity(
        lorac.compile(model, {"a": named})(*inputs), load_peft(model, tmp_path / "named")(*inputs), model(*inputs)
    )


@pytest.mark.medium("attention to itself", keep=["self-live"])
@pytest.mark.parametrize(
    ("call", "mode"),
    [
        ("self", "live"),
        ("cross", "live"),
        pytest.param("apart", "live", marks=pytest.mark.slow),
        ("self", "fused"),
        *(
            pytest.param(call, mode, marks=pytest.mark.slow)
            for call in ("cross", "apart")
            for mode in ("fused", "baked")
        ),
        pytest.param("self", "baked", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_onnxruntime(call, mode, tmp_path):
    model, inputs = made(call)
    adapter = adapter_of(model, inputs, lorac.LoRA(r=2, targets=("attn", "head")))
    model, inputs = model.float(), tuple(x.float() for x in inputs)
    eager, base = lorac.compile(model, {"a": adapter}), model(*inputs)
    emitted = lorac.compile(model, {"a": adapter}, target="onnxruntime", mode=mode, example_inputs=inputs)
    own = None if mode == "baked" else emitted(*inputs, adapters=None)
    assert_parity(emitted(*inputs), eager(*inputs), base, own_base=own)
    if mode == "baked":
        return
    assert_close(own, base)
    emitted.save(tmp_path / "artifact")
    loaded = lorac.load(tmp_path / "artifact")
    assert torch.equal(loaded(*inputs), emitted(*inputs))
    loaded.swap(None)
    assert torch.equal(loaded(*inputs), own)
    more = tuple(torch.cat([x, -x]) for x in inputs)
    emitted.swap("a")
    assert_parity(emitted(*more), eager(*more), model(*more), own_base=emitted(*more, adapters=None))


VARIANTS = (
    lorac.LoRA(r=2, lora_bias=True, targets=("attn",)),
    lorac.DoRA(r=2, targets=("attn",)),
    lorac.SHiRA(r=1, targets=("attn",)),
    lorac.IA3(targets=("attn",)),
    lorac.LoRA(r=2, targets=("attn",), exclude=("out_proj",), bias="lora_only"),
)


@pytest.mark.medium("two methods", keep=["doranone", "shiranone"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v.name}{v.bias}")
@torch.no_grad()
def test_every_method_of_weights_runs(variant):
    """W' and b' take the places of the module's own, whatever the method makes of them; undone to the bit."""
    model, inputs = made()
    adapter = adapter_of(model, inputs, variant)
    expected = copy.deepcopy(model)
    baked = lorac.compile(model, {"a": adapter}, mode="baked")
    for name, tensor in baked.host.named_parameters():
        expected.get_parameter(name).copy_(tensor)
    base = model(*inputs)
    for mode in ("live", "fused"):
        compiled = lorac.compile(model, {"a": adapter}, mode=mode)
        assert_parity(compiled(*inputs), expected(*inputs), base)
        compiled.swap(None)
        assert torch.equal(compiled(*inputs), base)
        compiled.swap("a")
        rows = compiled(*inputs, adapters=["a", None])
        assert_close(rows[0], expected(*inputs)[0])
        assert_close(rows[1], base[1])


def test_mixtures_train_and_explain():
    model, inputs = made()
    a, b = (adapter_of(model, inputs, lorac.LoRA(r=2, targets=("attn",)), name) for name in ("a", "bb"))
    compiled = lorac.compile(model, {"a": a, "bb": b}, active={"a": 0.5, "bb": 0.7})
    with torch.no_grad():
        held, base = compiled(*inputs), model(*inputs)
    assert_parity(compiled(*inputs), held, base)
    compiled.train()
    compiled(*inputs).square().sum().backward()
    for name, parameter in compiled.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or bool(parameter.grad.any())
    assert "its module reads in its own forward" in str(compiled.explain())


@torch.no_grad()
def test_rejects_a_later_adapter_without_a_slot():
    model, inputs = made()
    adapter = adapter_of(model, inputs, lorac.LoRA(r=2, targets=("attn",)))
    compiled = lorac.compile(model, {"x": lorac.LoRA(r=1, targets=("head",))})
    with pytest.raises(lorac.NeedsRecompile, match="'attn' has no slot") as caught:
        compiled.add_adapter(adapter)
    assert "targets=['attn', 'out_proj']" in str(caught.value)
    roomy = lorac.compile(model, reserve=lorac.Reserve(targets=("attn",), rank=1))
    roomy.add_adapter(adapter)
    roomy.swap("a")
    assert_parity(roomy(*inputs), lorac.compile(model, {"a": adapter})(*inputs), model(*inputs))


def test_rejects_adapters_that_do_not_fit():
    model, _ = made("apart")
    with refuses("site_unsupported", match="has a bias for 'attn', and its module 'attn' has none"):
        lorac.compile(model, {"a": lorac.LoRA(r=1, lora_bias=True, targets=("attn",))})
    with refuses("site_unsupported", match="meteora reads a layer's input and output; 'attn' has neither"):
        lorac.compile(model, {"a": lorac.MeteoRA(r=2, targets=("attn",))})
    other = Attending("apart", kdim=6)
    with refuses("site_unsupported", match="'attn', a MultiheadAttention that lorac cannot adapt"):
        tensors = {"lora_A": torch.zeros(1, WIDTH), "lora_B": torch.zeros(3 * WIDTH, 1)}
        lorac.compile(other, {"a": lorac.Adapter("a", lorac.LoRA(r=1, targets=("attn",)), {"attn": tensors})})


def test_rejects_saving_adapters_that_peft_cannot_hold(tmp_path):
    model, inputs = made()
    part = adapter_of(model, inputs, lorac.LoRA(r=2, targets=("out_proj",)))
    with refuses("unsupported_field", match="PEFT adapts all of 'attn' or nothing"):
        save_adapter(part, tmp_path / "x", model=model)
    scaled = adapter_of(model, inputs, lorac.DoRA(r=2, targets=("attn",)))
    with refuses("site_unsupported", match="PEFT has lora_A and lora_B only for 'attn'"):
        save_adapter(scaled, tmp_path / "x", model=model)
    with refuses("site_unsupported", match="PEFT's IA3 does not adapt 'attn', which is a weight within 'attn'"):
        save_adapter(adapter_of(model, inputs, lorac.IA3(targets=("attn",))), tmp_path / "x", model=model)
    assert not (tmp_path / "x").exists()


class Widths(nn.Module):
    """Attention whose queries, keys and values have a width each, and so a matrix each."""

    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(WIDTH, 2, kdim=6, vdim=5), nn.Linear(WIDTH, 3)

    def forward(self, x, keys, values):
        return self.head(self.attn(x, keys, values)[0])


@torch.no_grad()
def test_projections_of_a_width_each(tmp_path, by_layers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = Widths().double().eval()
        inputs = {"x": torch.randn(3, 2, WIDTH), "keys": torch.randn(4, 2, 6), "values": torch.randn(4, 2, 5)}
        inputs = {name: value.double() for name, value in inputs.items()}
    parameters = ["q_proj_weight", "attn.k_proj_weight", "v_proj_weight"]
    config = LoraConfig(r=2, target_modules=["head"], target_parameters=parameters)
    oracle = make_peft(model, tmp_path / "theirs", config, inputs=inputs)
    expected, base = oracle(**inputs), model(**inputs)
    for mode in ("live", "fused"):
        compiled = lorac.compile(model, {"a": tmp_path / "theirs"}, mode=mode)
        assert_parity(compiled(**inputs), expected, base)
        compiled.swap(None)
        assert torch.equal(compiled(**inputs), base)
    save_adapter(load_adapter(tmp_path / "theirs", model), tmp_path / "ours", model=model)
    assert torch.equal(load_peft(model, tmp_path / "ours")(**inputs), expected)


@torch.no_grad()
def test_an_output_layer_that_peft_targets_by_itself(tmp_path, by_layers):
    """PEFT wraps it and never runs it before it is merged: lorac computes what is merged, and says so."""
    model, inputs = made()
    config = LoraConfig(r=2, target_modules="all-linear")
    oracle = make_peft(model, tmp_path, config, inputs=dict(zip(("x", "other"), inputs, strict=True)))
    with pytest.warns(
        lorac.LoracWarning, match="'attn.out_proj', and 'attn' reads that weight itself: PEFT runs them only"
    ):
        compiled = lorac.compile(model, {"a": tmp_path})
    assert_parity(compiled(*inputs), oracle.merge_and_unload()(*inputs), model(*inputs))


def test_a_file_of_a_later_peft(tmp_path):
    model, inputs = made()
    make_peft(model, tmp_path, CONFIG, inputs=dict(zip(("x", "other"), inputs, strict=True)))
    configure(tmp_path, peft_version="0.99.1")
    with pytest.warns(lorac.LoracWarning, match=r"of PEFT 0\.99\.1; up to 0\.21 PEFT adds .* twice"):
        load_adapter(tmp_path, model)


@pytest.mark.medium("the file's own attention layers")
@torch.no_grad()
def test_torchvisions_vit_and_torchs_own_layers(tmp_path, by_layers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vit = torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=3).eval()
        nn.init.normal_(vit.heads.head.weight)
        image = torch.randn(2, 3, 16, 16)
        layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0)
        decoder, pair = nn.TransformerDecoder(layer, 2).eval(), (torch.randn(3, 2, 8), torch.randn(4, 2, 8))
    cases = (
        (vit, ["self_attention", "mlp.0"], {"x": image}),
        (decoder, ["self_attn", "multihead_attn"], dict(zip(("tgt", "memory"), pair, strict=True))),
    )
    for model, targets, inputs in cases:
        folder = tmp_path / type(model).__name__
        oracle = make_peft(model, folder, LoraConfig(r=2, target_modules=targets), inputs=inputs)
        expected, base = oracle(**inputs), model(**inputs)
        assert_parity(lorac.compile(model, {"a": folder})(**inputs), expected, base)
    emitted = lorac.compile(vit, {"a": tmp_path / "VisionTransformer"}, target="onnxruntime", example_inputs=(image,))
    answer, own = lorac.compile(vit, {"a": tmp_path / "VisionTransformer"})(image), emitted(image, adapters=None)
    assert_parity(emitted(image), answer, vit(image), own_base=own)


@pytest.mark.medium("eager, and runtime/test_traits.py on ONNX Runtime", cases=["onnxruntime"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@torch.no_grad()
def test_in_each_of_several_components(target):
    """A weight is the module's of its own component, and one that reads it in two calls reads the adapter's in both."""

    class Twice(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.attended = made("cross")[0].float()
            nn.init.constant_(self.attended.head.bias, seed)

        def forward(self, x, other):
            first, _ = self.attended.attn(x, other, other)
            return self.attended(first, x)

    inputs = tuple(x.float() for x in made("cross")[1])
    models = {"one": Twice(1.0).eval(), "two": Twice(2.0).eval()}
    adapter = adapter_of(made("cross")[0], made("cross")[1], lorac.LoRA(r=2, targets=("attn",)))
    parts = {f"one.attended.{path}": at for path, at in adapter.tensors.items()}
    placed = lorac.Adapter("a", adapter.variant, parts)
    compiled = lorac.compile(models, {"a": placed}, target=target, example_inputs=dict.fromkeys(models, inputs))
    alone = lorac.Adapter("a", adapter.variant, {f"attended.{path}": at for path, at in adapter.tensors.items()})
    expected = lorac.compile(models["one"], {"a": alone}, mode="baked")(*inputs)
    base = models["one"](*inputs)
    assert_parity(compiled["one"](*inputs), expected, base, own_base=compiled["one"](*inputs, adapters=None))
    assert_close(compiled["two"](*inputs), models["two"](*inputs))


@pytest.mark.slow
@torch.no_grad()
def test_siglips_convolution_and_pooling_head(tmp_path, by_layers):
    config = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.SiglipVisionModel(config).eval()
        given = {"pixel_values": torch.randn(2, 3, 16, 16)}
    targets = ["patch_embedding", "q_proj", "head.attention", "fc1"]
    outputs = ("pooler_output",)
    oracle = make_peft(
        model, tmp_path, LoraConfig(r=2, target_modules=targets), inputs=given, outputs=outputs, contribution=0.1
    )
    expected, base = oracle(**given), model(**given)
    assert_parity(lorac.compile(model, {"a": tmp_path})(**given), expected, base, names=outputs)
    for mode in ("live", "fused"):
        emitted = lorac.compile(model, {"a": tmp_path}, target="onnxruntime", mode=mode)
        own = emitted(**given, adapters=None)
        assert_parity(emitted(**given), expected, base, own_base=own, names=outputs)
