"""Region-aware attention, isolation and maps: against attention written out in diffusers' own processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lorac
from lorac.analysis.methods import render_markdown
from lorac.cli.models import method_rows
from lorac.diffusion.attention import AttentionMaps, ConceptIsolation, RegionAttention, rasterise
from lorac.testing import assert_close, assert_parity
from tests.diffusion.small_unet import HEADS, TOKENS, dynamic_shapes, inputs, noisy, small_unet
from tests.limits import assert_apart
from tests.refusing import refuses

diffusers = pytest.importorskip("diffusers")
BOXES = ((0.0, 0.0, 0.75, 0.5), (0.25, 0.5, 1.0, 1.0))
VARIANTS = {
    "maps": AttentionMaps(),
    "regions": RegionAttention(tokens=TOKENS, r=2),
    "isolation": ConceptIsolation(),
}
ON = dict.fromkeys(VARIANTS, 1.0)
AUX = ["maps", "region_maps", "self_maps"]


@pytest.fixture(scope="module")
def unet() -> Any:
    return small_unet()


@pytest.fixture(scope="module")
def eager(unet: Any) -> lorac.Compiled:
    return lorac.compile(unet, VARIANTS, active=ON, aux=AUX)


def put(program: lorac.Compiled, boxes: Any = (), **filled: Tensor) -> None:
    """Boxes, and noise or given tensors for the words of both regions."""
    rows = torch.tensor([*boxes, *[(0.0,) * 4] * (2 - len(boxes))])
    for name in ("regions", "isolation"):
        adapter = noisy(program.adapters[name])
        for tensors in adapter.tensors.values():
            tensors["boxes"].copy_(rows)
            if "groups" in tensors:
                tensors["groups"].fill_(1.0)
    for tensors in program.adapters["regions"].tensors.values():
        for key, value in filled.items():
            tensors[key].copy_(value)


@torch.no_grad()
def answer(program: Any, given: dict[str, Tensor], **choice: Any) -> Tensor:
    return program(**given, **choice).sample


def test_boxes_cover_cells() -> None:
    masks = rasterise(torch.tensor([(0.0, 0.25, 0.5, 1.0), (0.3, 0.0, 0.55, 0.3), (0.0,) * 4]), 10, 4)
    assert masks[0].nonzero().tolist() == [[r, c] for r in range(5) for c in (1, 2, 3)]
    assert masks[1].nonzero().tolist() == [[3, 0], [4, 0]] and not masks[2].any()


def test_equals_the_model_without_boxes(unet: Any, eager: lorac.Compiled) -> None:
    put(eager)
    given = inputs()
    assert torch.equal(answer(eager, given), answer(unet, given))
    assert torch.equal(answer(eager, given, adapters=None), answer(unet, given))


def test_regions_are_attention_written_out(unet: Any, eager: lorac.Compiled) -> None:
    put(eager, BOXES)
    given = inputs(4, 8, 12)
    for tensors in eager.adapters["regions"].tensors.values():
        tensors["groups"].fill_(2.0)
    base, got = answer(unet, given), answer(eager, given, adapters={"regions": 1.0})
    wanted = answer(_with_processor(eager.adapters["regions"].tensors, (8, 12)), given)
    assert_parity(got, wanted, base)


def _with_processor(tensors: Any, size: tuple[int, int]) -> Any:
    """A U-Net whose cross-attention computes the paper's equations, box by box."""
    unet = small_unet()

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)

    class Processor:
        def __init__(self, name: str) -> None:
            self.own = tensors.get(f"{name.removesuffix('.processor')}.to_out.0") if "attn2" in name else None

        def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Any = None, **_: Any) -> Tensor:
            states = x if encoder_hidden_states is None else encoder_hidden_states
            q, own = heads(attn.to_q(x)), self.own
            o = F.scaled_dot_product_attention(q, heads(attn.to_k(states)), heads(attn.to_v(states)))
            base = attn.to_out[0](o.transpose(1, 2).flatten(2))
            if own is None:
                return base
            stride = round((size[0] * size[1] / x.shape[1]) ** 0.5)
            grid = rasterise(own["boxes"], size[0] // stride, size[1] // stride).flatten(1)
            result = base.clone()
            for row, pixel in ((row, p) for row in range(len(x)) for p in grid.any(0).nonzero().flatten().tolist()):
                group, outputs = row * 2 // len(x), []
                for n in grid[:, pixel].nonzero().flatten().tolist():
                    k, v = heads(own["keys"][group, n]), heads(own["values"][group, n])
                    o = F.scaled_dot_product_attention(q[row, :, pixel : pixel + 1], k, v).flatten()
                    weight = attn.to_out[0].weight + own["out_B"][n] @ own["out_A"][n]
                    outputs.append(F.linear(o, weight, attn.to_out[0].bias))
                result[row, pixel] = torch.stack(outputs).mean(0)
            return result

    unet.set_attn_processor({name: Processor(name) for name in unet.attn_processors})
    return unet


def own_words(eager: lorac.Compiled, unet: Any, states: Tensor) -> dict[str, dict[str, Tensor]]:
    """The model's own keys and values of a prompt (tokens, width), by site."""
    found = {}
    for path in eager.adapters["regions"].tensors:
        attention = unet.get_submodule(path.removesuffix(".to_out.0"))
        found[path] = {"keys": attention.to_k(states), "values": attention.to_v(states)}
    return found


def test_equals_the_model_with_its_own_words_in_every_box(unet: Any, eager: lorac.Compiled) -> None:
    given = inputs(1)
    put(eager, [(0.0, 0.0, 1.0, 1.0)], out_A=torch.zeros(()))
    for path, words in own_words(eager, unet, given["encoder_hidden_states"][0]).items():
        for key, value in words.items():
            eager.adapters["regions"].tensors[path][key].copy_(value)
    base, one = answer(unet, given), answer(eager, given, adapters={"regions": 1.0})
    assert_close(one, base)
    for tensors in eager.adapters["regions"].tensors.values():
        tensors["boxes"].copy_(tensors["boxes"][0].clone())  # two regions of the same words, one over the other
    two = answer(eager, given, adapters={"regions": 1.0})
    assert_close(two, one)


def test_outside_all_boxes_an_attention_is_the_models(unet: Any) -> None:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
    seen: dict[str, Tensor] = {}
    program = lorac.compile(unet, {"regions": RegionAttention(targets=(path,), tokens=TOKENS)}, active="regions")
    noisy(program.adapters["regions"])
    for tensors in program.adapters["regions"].tensors.values():
        tensors["boxes"].copy_(torch.tensor([BOXES[0], (0.0,) * 4]))
    for name, model in (("base", unet), ("regions", program)):
        module = model.get_submodule(path)
        hook = module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        answer(model, inputs())
        hook.remove()
    inside = rasterise(torch.tensor([BOXES[0]]), 8, 8).flatten()
    assert torch.equal(seen["base"][:, ~inside], seen["regions"][:, ~inside])
    assert_apart(seen["regions"][:, inside], seen["base"][:, inside])


def test_regions_do_not_see_each_other(eager: lorac.Compiled) -> None:
    given = inputs()
    put(eager)
    answer(eager, given, adapters={"isolation": 1.0})
    path, before = next((path, maps) for path, maps in eager.aux["self_maps"].items() if maps.shape[1] == 64)
    put(eager, BOXES)
    answer(eager, given, adapters={"isolation": 1.0})
    maps = eager.aux["self_maps"][path]
    one, two = rasterise(torch.tensor(BOXES), 8, 8).flatten(1)
    assert not maps[:, one][..., two].any() and before[:, one][..., two].sum(-1).min() > 0.1
    assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    assert torch.equal(maps[:, ~(one | two)], before[:, ~(one | two)])


def test_maps_are_probabilities_by_row(unet: Any, eager: lorac.Compiled) -> None:
    given, seen = inputs(), {}
    read = {name: module for name, module in unet.named_modules() if name.endswith(("attn2.to_q", "attn2.to_k"))}
    hooks = [m.register_forward_hook(lambda _, __, y, n=n: seen.update({n: y})) for n, m in read.items()]
    answer(unet, given)
    for hook in hooks:
        hook.remove()
    put(eager)
    answer(eager, given, adapters={"maps": 1.0})
    for path, maps in eager.aux["maps"].items():
        q, k = (
            seen[f"{path.removesuffix('.to_out.0')}.{name}"].unflatten(-1, (HEADS, -1)) for name in ("to_q", "to_k")
        )
        scores = torch.einsum("bphd,bthd->bhpt", q, k) / q.shape[-1] ** 0.5
        assert_close(maps, scores.softmax(-1).mean(1))


@pytest.mark.parametrize("path", ["conv_in", "attn1.to_out.0"])
def test_rejects_other_layers(unet: Any, path: str) -> None:
    with refuses("site_unsupported", match=r"output projections of cross-attention(.|\n)*attn2\.to_out\.0"):
        lorac.compile(unet, {"maps": AttentionMaps(targets=[path])})


@pytest.mark.parametrize("variant", [AttentionMaps(), RegionAttention()])
@pytest.mark.parametrize("second", [(), (0,)])
def test_rejects_joint_attention(variant: Any, second: tuple[int, ...]) -> None:
    """SD3.5's second attention has the name of a U-Net's cross-attention, and is self-attention."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        caption_projection_dim=8, joint_attention_dim=8, pooled_projection_dim=8, dual_attention_layers=second,
    )  # fmt: skip
    with refuses("site_unsupported", match="for the joint attention"):
        lorac.compile(model, {"a": variant})


def test_regions_need_rows_and_columns_of_pixels() -> None:
    model = diffusers.PixArtTransformer2DModel(
        sample_size=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, cross_attention_dim=8,
        norm_num_groups=1, caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    with refuses("site_unsupported", match="not in a transformer of a U-Net"):
        lorac.compile(model, {"a": RegionAttention()})
    assert lorac.compile(model, {"a": AttentionMaps()}).adapters


@pytest.mark.slow  # one more program; eager mode tests the same formulas above
def test_regions_in_onnxruntime_take_other_sizes(unet: Any, eager: lorac.Compiled) -> None:
    put(eager, BOXES)
    options = {"example_inputs": inputs(), "dynamic_shapes": dynamic_shapes()}
    engine = lorac.compile(unet, dict(eager.adapters), "onnxruntime", active=ON, **options)
    put(engine, BOXES)
    for given in (inputs(2), inputs(4, 8, 12, seed=2), inputs(1, 16, 8, seed=3)):
        assert_parity(answer(engine, given), answer(eager, given), answer(unet, given))
    put(engine)
    assert_close(answer(engine, inputs()), answer(unet, inputs()))


def test_the_table_of_methods_has_them() -> None:
    page = render_markdown(method_rows([RegionAttention, ConceptIsolation, AttentionMaps]))
    assert all(method.name in page for method in (RegionAttention, ConceptIsolation, AttentionMaps))
