"""AdapterTune: the oracles of its paper, and a ViT and a Llama with it, in eager and in ONNX Runtime."""

import copy
from types import SimpleNamespace

import pytest
import torch

import lorac
from lorac import Site, SiteKind
from lorac.ir.slots.execution import FormulaContext
from lorac.ir.slots.program_values import replace_first_tensor
from tests.limits import assert_deviation, decimals
from tests.oracles import adaptertune as oracle
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.variants.away import away
from tests.variants.vits import VITS, answer, vit
from tests.zoo import ZOO

BLOCK = Site("blocks.0", SiteKind.BLOCK, 2, 2, torch.float64, None)


def test_the_hand_computed_example():
    row = {"down": [[1, 1]], "down_bias": [0], "up": [[0.5], [-1]], "up_bias": [0, 0]}
    p = SimpleNamespace(**{name: torch.tensor(value, dtype=torch.float64) for name, value in row.items()})
    h = torch.tensor([1.0, 2.0], dtype=torch.float64)
    y = lorac.AdapterTune(r=1).branch(torch.zeros(2), h, p, FormulaContext(BLOCK))
    assert decimals(y, 6) == [2.497975, -0.995950]


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_starts_at_the_base_and_trains_only_the_upper_half(alpha):
    entry = ZOO["tiny_vit"]
    model, inputs = entry.model(), entry.inputs()
    compiled = lorac.compile(model, {"a": lorac.AdapterTune(r=3, alpha=alpha)})
    y = compiled(**inputs).logits
    assert torch.equal(y, model(**inputs).logits)
    y.square().sum().backward()
    for tensors in compiled.adapters["a"].tensors.values():
        moved = {name: bool(tensor.grad.any()) for name, tensor in tensors.items()}
        assert moved == {"down": False, "down_bias": False, "up": True, "up_bias": True}


@pytest.mark.parametrize(("width", "total"), [(192, 76_224), (384, 152_256), (768, 304_320)])
def test_the_papers_parameter_counts(width, total):
    site = Site("blocks.0", SiteKind.BLOCK, width, width, torch.float32, None)
    specs = lorac.AdapterTune(r=16).params(site)
    assert 12 * sum(torch.Size(spec.shape).numel() for spec in specs.values()) == total


def test_every_other_block():
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()) for _ in range(12)))
    adapter = lorac.compile(model, {"a": lorac.AdapterTune(r=2, every=2)}).adapters["a"]
    assert adapter.sites == ("0", "2", "4", "6", "8", "10")
    adapter = lorac.compile(model, {"a": lorac.AdapterTune(r=2, layers=[1, 3])}).adapters["a"]
    assert adapter.sites == ("1", "3")


def test_default_targets_are_the_blocks_of_every_network():
    for name, blocks in {"tiny_llama": 3, "tiny_vit": 2, "tiny_bert": 2, "tiny_gpt2": 2, "tiny_t5": 4}.items():
        adapter = lorac.compile(ZOO[name].model(), {"a": lorac.AdapterTune(r=2)}).adapters["a"]
        assert len(adapter.sites) == blocks, name
        assert all(path.rpartition(".")[2].isdigit() for path in adapter.sites)


def test_accepts_small_init_and_rejects_an_unknown_one():
    model = ZOO["tiny_vit"].model()
    tensors = lorac.compile(model, {"a": lorac.AdapterTune(r=4, init="small")}).adapters["a"].tensors
    assert_deviation(tensors["vit.layers.0"]["up"], 1e-4)
    with pytest.raises(lorac.OptionError, match="zero"):
        lorac.compile(model, {"a": lorac.AdapterTune(init="zeros")})


def test_rejects_a_linear_layer():
    with refuses("site_unsupported"):
        lorac.compile(ZOO["tiny_vit"].model(), {"a": lorac.AdapterTune(targets=["fc1"])})


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_rejects_fusing_and_baking(mode):
    with refuses("not_mergeable"):
        lorac.compile(ZOO["tiny_vit"].model(), {"a": lorac.AdapterTune(r=2)}, mode=mode, active="a")


def test_frozen_tensors_stay_and_every_adapter_tensor_trains():
    entry = ZOO["tiny_vit"]
    model = entry.fresh()
    compiled = lorac.compile(model, {"a": lorac.AdapterTune(r=3, init="small")})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = [tensor.detach().clone() for tensor in compiled.adapters["a"].parameters()]
    optimizer = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    compiled.train()
    for _ in range(3):
        optimizer.zero_grad()
        compiled(**entry.inputs()).logits.square().mean().backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(map(torch.equal, compiled.adapters["a"].parameters(), start))


@pytest.mark.slow("a vision transformer of torchvision's there, and the kit's swaps")
@pytest.mark.parametrize("name", ["tiny_vit", "tiny_llama"])
@torch.no_grad()
def test_onnx_runtime_equals_eager_away_from_init_and_swaps(name):
    entry = ZOO[name]
    model, inputs = entry.model(), entry.inputs()
    adapters = {key: away(lorac.AdapterTune(r=3), model, inputs, key) for key in ("a", "b")}
    eager = lorac.compile(model, adapters)
    emitted = lorac.compile(model, adapters, target="onnxruntime")
    base, own = model(**inputs), emitted(**inputs)
    for choice in ("a", "b", {"a": 0.4}, {"a": 0.7, "b": 0.3}):
        emitted.swap(choice)
        reference = eager(**inputs, adapters=choice)
        assert_parity(emitted(**inputs), reference, base, own_base=own, names=["logits"])
    emitted.swap(None)
    assert torch.equal(emitted(**inputs).logits, own.logits)


@torch.no_grad()
def test_the_sum_of_a_mixture_is_against_the_blocks_own_output():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.GELU())).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    adapters = {key: away(lorac.AdapterTune(r=3), model, (x,), key) for key in ("a", "b")}
    compiled = lorac.compile(model, adapters)
    base, one, two = model(x), compiled(x, adapters="a"), compiled(x, adapters="b")
    mixed = compiled(x, adapters={"a": 0.7, "b": 0.3})
    assert_parity(mixed, base + 0.7 * (one - base) + 0.3 * (two - base), base)


@pytest.mark.medium("the kit's blocks, and test_default_targets_are_the_blocks_of_every_network")
@pytest.mark.slow("torchvision's", keep=["torchvision-vit"])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in {"timm-swin", "torchvision-vit"} else pytest.mark.slow) for n in VITS]
)
@torch.no_grad()
def test_matches_the_equation_behind_blocks_of_vision_transformers(name):
    """Against the paper's equation in float64, by hooks at the blocks."""
    model, images = vit(name)
    given = {"pixel_values": images} if name.startswith("transformers") else (images,)
    compiled = lorac.compile(model, {"a": lorac.AdapterTune(r=2)}, example_inputs=given)
    assert compiled.adapters["a"].sites == VITS[name][1]
    base = answer(model(images))
    assert torch.equal(answer(compiled(images)), base)
    adapter = away(compiled.adapters["a"].variant, model, given, "a", share=0.3)
    compiled = lorac.compile(model, {"a": adapter}, example_inputs=given)
    wide = copy.deepcopy(model).double()
    for path, at in adapter.tensors.items():
        p = SimpleNamespace(**{key: t.double().numpy() for key, t in at.items()})

        def behind(module, args, output, p=p):
            return replace_first_tensor(
                output, lambda h: torch.from_numpy(oracle.branch(None, h.numpy(), p, adapter.variant))
            )

        wide.get_submodule(path).register_forward_hook(behind)
    expected = answer(wide(images.double()))
    assert_parity(answer(compiled(images)), expected.float(), base)
    emitted = lorac.compile(model, {"a": adapter}, target="onnxruntime", example_inputs=given)
    own = answer(emitted(images, adapters=None))
    assert_parity(answer(emitted(images)), expected.float(), base, own_base=own)


def test_every_other_block_is_counted_through_all_stages():
    model, images = vit("timm-swin")
    compiled = lorac.compile(model, {"a": lorac.AdapterTune(r=2, every=3)}, example_inputs=(images,))
    assert compiled.adapters["a"].sites == ("layers.0.blocks.0", "layers.1.blocks.1")
    with pytest.raises(lorac.ExampleInputsNeeded):  # stages hold blocks: which are meant, a run tells
        lorac.compile(model, {"a": lorac.AdapterTune(r=2)})
