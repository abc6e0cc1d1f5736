"""(IA)³ by hand, and its input scale in every way that values are combined."""

import dataclasses

import pytest
import torch
from torch import nn

import lorac
from lorac.ir.algebra.changes import LowRank
from lorac.testing import HOSTS, Case, Oracle, assert_close, conformance
from tests import parity
from tests.oracles import ia3 as equations

INPUTS = dataclasses.replace(Oracle.of(equations), count=None)
SCALED = lorac.IA3(feedforward=("site",))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.medium("the formula, mixtures, and the kit's other checks of other methods", keep=["*-formula"])
@pytest.mark.parametrize(
    "check",
    [
        *conformance(SCALED, INPUTS, hosts={"linear": HOSTS["linear"]}),
        *conformance(SCALED, INPUTS, targets=(), hosts={name: HOSTS[name] for name in ("transposed", "conv")}),
    ],
    ids=str,
)
def test_input_scale_conforms(check):
    check()


@pytest.mark.parametrize(
    ("feedforward", "scale", "weight", "bias"),
    [
        ((), [[2.0], [3.0]], [[2.0, 4.0, 6.0], [12.0, 15.0, 18.0]], [2.0, -3.0]),
        (("site",), [[2.0, 3.0, 4.0]], [[2.0, 6.0, 12.0], [8.0, 15.0, 24.0]], [1.0, -1.0]),
    ],
)
@torch.no_grad()
def test_worked_example(feedforward, scale, weight, bias):
    model = nn.Sequential()
    model.add_module("site", nn.Linear(3, 2, dtype=torch.float64))
    model.site.weight.data, model.site.bias.data = tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), tensor([1.0, -1.0])
    variant = lorac.IA3(feedforward=feedforward, targets=("site",))
    adapter = lorac.Adapter("a", variant, {"site": {"ia3_l": tensor(scale)}})
    baked = lorac.compile(model, {"a": adapter}, mode="baked")
    assert baked.host.site.weight.tolist() == weight
    assert baked.host.site.bias.tolist() == bias
    live = lorac.compile(model, {"a": adapter})
    assert live(tensor([[1.0, 1.0, -1.0]])).tolist() == baked(tensor([[1.0, 1.0, -1.0]])).tolist()
    value = live.pool["a"].changes["site"]
    assert isinstance(value, LowRank)
    assert value.rank == 0
    assert set(value.scales) == {"d" if feedforward else "c"}
    assert live.plans["site"].rank == 0
    assert not live.plans["site"].bound


def test_a_convolution_scales_channels_through_its_weight():
    case = Case(SCALED, HOSTS["conv"])
    assert case.a.tensors["site"]["ia3_l"].shape == (1, 3)
    assert case.live.plans["site"].bound
    assert "changes the site's input" in case.live.plans["site"].reasons[0].why


@pytest.mark.parametrize(
    ("feedforward", "path", "expected"),
    [
        (("proj",), "h.0.c_proj", True),  # endings, not names: as PEFT compares
        (("mlp.proj",), "h.0.c_proj", False),
        ((), "h.0.c_proj", False),
        (r".*\.0\..*", "h.0.c_proj", True),
        (r"\.0\.", "h.0.c_proj", False),
    ],
)
def test_feedforward_modules(feedforward, path, expected):
    assert lorac.IA3(feedforward=feedforward).scales_input(path) is expected


def adapters(host):
    """Adapters of several methods on one site, away from init, the first scaling inputs."""
    others = (lorac.LoRA(r=2), lorac.DoRA(r=2), lorac.IA3(), lorac.SHiRA(r=1))
    cases = {name: Case(v, HOSTS[host]) for name, v in zip("abcde", (SCALED, *others), strict=True)}
    return cases["a"].model, {name: dataclasses.replace(case.a, name=name) for name, case in cases.items()}


CHOICES = ({"a": 0.5}, {"a": 0.7, "b": 0.3}, {"a": 0.5, "c": 0.4}, {"a": 0.5, "d": 0.5}, {"a": 0.8, "e": 1.0}, "a", "e")
"""Two scales of the inputs, a pair, a scaled output (of DoRA, of IA3), and sparse values."""


def _names(choice):
    return {choice: 1.0} if isinstance(choice, str) else choice


@pytest.mark.medium("live, and fused mixtures of other methods in the kit", cases=["fused"])
@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_mixtures_are_sums(mode):
    model, made = adapters("linear")
    x = HOSTS["linear"].inputs((5,))
    base = model(x)
    moved = {name: lorac.compile(model, {name: one}, mode="baked")(x) - base for name, one in made.items()}
    for choice in CHOICES:
        expected = base + sum(t * moved[name] for name, t in _names(choice).items())
        needed = lorac.compile(model, {n: made[n] for n in _names(choice)}, mode=mode, active=None)
        every = lorac.compile(model, made, mode=mode, active=None)
        for compiled in (needed, every):
            for before in ("a", None):
                compiled.swap(before if before in compiled.adapters else None)
                compiled.swap(choice)
                parity.assert_parity(compiled(x), expected, base)
            compiled.swap(None)
            assert torch.equal(compiled(x), base)


def test_mixtures_have_gradients():
    model, made = adapters("linear")
    x = HOSTS["linear"].inputs((5,))
    compiled = lorac.compile(model, made, active=None)
    for choice in CHOICES:
        compiled.swap(choice)
        with torch.no_grad():
            expected, base = compiled(x), model(x)
        parity.assert_parity(compiled(x), expected, base)


@pytest.mark.medium("mixtures in eager, and runtime/test_swap.py has them there")
@torch.no_grad()
def test_mixtures_in_onnxruntime():
    model, made = adapters("linear")
    model, x = model.float(), HOSTS["linear"].inputs((5,)).float()
    made = {name: made[name] for name in "abc"}
    compiled = lorac.compile(model, made, target="onnxruntime", example_inputs=(x,), active=None)
    eager, base = lorac.compile(model, made), model(x)
    own = compiled(x)
    for choice in (*CHOICES[:3], "a", "c"):
        compiled.swap(choice)
        parity.assert_parity(compiled(x), eager(x, adapters=choice), base, own_base=own)
    compiled.swap(None)
    assert torch.equal(torch.as_tensor(compiled(x)), torch.as_tensor(own))


def test_half_precision_inputs_stay_half():
    """The scale is float32 over a half-precision base (PEFT's rule), what it scales is not."""
    model = nn.Sequential()
    model.add_module("site", nn.Linear(6, 4, dtype=torch.bfloat16))
    scale = torch.linspace(0.5, 1.5, 6)[None]
    adapter = lorac.Adapter("a", dataclasses.replace(SCALED, targets=("site",)), {"site": {"ia3_l": scale}})
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        expected = model((x * scale).to(torch.bfloat16))
        answers = [lorac.compile(model, {"a": adapter})(x)]
    answers.append(lorac.compile(model, {"a": adapter})(x).detach())
    for answer in answers:
        assert answer.dtype == torch.bfloat16
        assert_close(answer, expected)


def test_a_convolution_with_a_pair_too():
    """Rank 0 in a slot that has room for more: torch has no convolution with an empty kernel."""
    lora, scales = (Case(v, HOSTS["conv"]) for v in (lorac.LoRA(r=2), lorac.IA3()))
    x, named = lora.x, {"a": lora.a, "b": dataclasses.replace(scales.a, name="b")}
    compiled = lorac.compile(lora.model, named, active="b")
    with torch.no_grad():
        expected, base = scales.live(x), lora.base(x)
        parity.assert_parity(compiled(x), expected, base)
    parity.assert_parity(compiled(x), expected, base)


def test_published_count():
    """T0-3B: keys, values and hidden activations of 24 + 24 blocks, whose decoder has a second attention: 0.54 M."""
    variant = lorac.IA3(feedforward=("wo",))
    layers = {"k": nn.Linear(2048, 2048, device="meta"), "wo": nn.Linear(5120, 2048, device="meta")}
    sites = lorac.sites(nn.ModuleDict(layers))
    key, hidden = (variant.params(sites[name])["ia3_l"].shape for name in ("k", "wo"))
    assert (key, hidden) == ((2048, 1), (1, 5120))
    assert 24 * (2 * key[0] + hidden[1]) + 24 * (4 * key[0] + hidden[1]) == 540_672
