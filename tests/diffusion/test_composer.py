"""LoRA-Composer's constraints by hand, and its loop on a U-Net of random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.diffusion.attention import rasterise
from lorac.diffusion.composer import Composer
from lorac.diffusion.constraints import begin_in_boxes, bell, concept_loss, leak_loss, update_rate
from lorac.diffusion.regions import Region
from lorac.testing import assert_close, assert_parity
from tests.diffusion.small_unet import (
    TOKENS,
    WIDTH,
    inputs,
    noisy,
    prompt_xl,
    sample_plainly,
    scheduler,
    small_unet,
    small_unet_xl,
    states,
)
from tests.limits import decimals
from tests.refusing import refuses

pytest.importorskip("diffusers")
LEFT, RIGHT = (0.0, 0.0, 1.0, 0.5), (0.0, 0.5, 1.0, 1.0)
STEPS = 4


@pytest.fixture(scope="module")
def unet() -> Any:
    return small_unet()


@pytest.fixture(scope="module")
def concepts(unet: Any) -> list[lorac.Adapter]:
    variant = lorac.LoRA(r=2, targets=["attn2.to_k", "attn2.to_v", "attn2.to_out.0", "to_q"])
    made = lorac.compile(unet, {"one": variant, "two": variant}, active=None).adapters
    return [noisy(made["one"], seed=1, size=0.2), noisy(made["two"], seed=2, size=0.2)]


@pytest.fixture(scope="module")
def regions(concepts: list[lorac.Adapter]) -> list[Region]:
    places = zip((LEFT, RIGHT), concepts, (1, 2), strict=True)
    return [Region(box, states(10 + n), states(20 + n), (1, 2), concept) for box, concept, n in places]


@pytest.fixture(scope="module")
def composer(unet: Any) -> Composer:
    return Composer(unet, scheduler(), tokens=TOKENS, r=2, stride=1)


def make(composer: Composer, regions: list[Region], **options: Any) -> Tensor:
    return composer(inputs(1)["sample"], states(1), states(2), regions, steps=STEPS, guidance=3.0, **options)


# ── Constraints ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_losses_by_hand() -> None:
    maps = torch.tensor([[0.2, 0.8, 0.1, 0.0], [0.4, 0.6, 0.0, 0.1], [0.0, 0.0, 0.3, 0.2], [0.0, 0.0, 0.1, 0.1]])
    box = rasterise(torch.tensor([(0.0, 0.0, 0.5, 0.5)]), 4, 4)[0]
    # A fifth of four cells is none, so that the mean is that of the largest: 8·.2; twice .2 and twice .15 by the sides.
    assert_close(concept_loss(maps[..., None], box, smooths=False), torch.tensor(1.6 + 0.4 + 0.3))
    whole = torch.ones(3, 3, dtype=torch.bool)
    assert decimals(bell(whole), 6) == [
        0.367879,
        0.606531,
        0.367879,
        0.606531,
        1.0,
        0.606531,
        0.367879,
        0.606531,
        0.367879,
    ]
    assert torch.equal(bell(box), box.float())
    assert [round(update_rate(step, 50), 4) for step in (0, 49)] == [20.0, 14.1421]


def test_leaks_are_attention_out_of_the_box() -> None:
    box = torch.tensor([[True, False]])
    assert_close(leak_loss(torch.tensor([[0.3, 0.7], [0.5, 0.5]]), box), torch.tensor(7.0))
    assert float(leak_loss(torch.tensor([[0.3, 0.7], [0.5, 0.5]]), torch.ones(1, 2, dtype=torch.bool))) == 0


def test_noise_moves_into_the_box_and_keeps_its_moments() -> None:
    latents = inputs(2, 8, 8)["sample"] * 2 + 1
    maps, box = torch.zeros(2, 1, 4, 4), rasterise(torch.tensor([(0.0, 0.0, 0.5, 0.5)]), 4, 4)
    maps[0, 0, 2:, 1:3] = 1.0
    maps[1, 0, :2, :2] = 1.0
    moved = begin_in_boxes(latents, maps, box)
    axes = (1, 2, 3)
    assert_close(moved.mean(axes), latents.mean(axes))
    assert_close(moved.std(axes), latents.std(axes))
    window, before = (x - x.mean() for x in (moved[0, :, :4, :4], latents[0, :, 4:, 2:6]))
    assert_close(window / window.std(), before / before.std())
    assert_close(moved[1], latents[1])


# ── The loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def plainly(unet: Any) -> Tensor:
    """Sampling by the model alone."""
    return sample_plainly(unet, inputs(1)["sample"], [states(1), states(2)], STEPS)


def test_samples_as_the_model_without_regions(unet: Any, composer: Composer) -> None:
    assert torch.equal(make(composer, []), plainly(unet))


def test_passes_added_conditions_to_an_xl_unet(regions: list[Region]) -> None:
    unet, prompts = small_unet_xl(), [prompt_xl(1), prompt_xl(2)]
    composer, noise = Composer(unet, scheduler(), tokens=TOKENS, r=2, stride=1), inputs(1)["sample"]
    added = {name: torch.stack([prompt.added[name] for prompt in prompts]) for name in prompts[0].added}
    wanted = sample_plainly(unet, noise, [states(1), states(2)], STEPS, added_cond_kwargs=added)
    assert torch.equal(composer(noise, *prompts, [], steps=STEPS, guidance=3.0), wanted)
    noise = inputs(2)["sample"]
    each = {name: values.repeat_interleave(len(noise), 0) for name, values in added.items()}
    wanted = sample_plainly(unet, noise, [states(1), states(2)], STEPS, added_cond_kwargs=each)
    assert torch.equal(composer(noise, *prompts, [], steps=STEPS, guidance=3.0), wanted)
    assert not torch.equal(composer(noise, *prompts, regions, steps=STEPS, guidance=3.0), wanted)
    with refuses("input_mismatch", match="text_embeds, time_ids, and one has states alone"):
        composer(noise, prompts[0], states(2), [], steps=1)


@pytest.mark.medium("test_clora.py: a small update lowers the loss")
def test_updates_lower_the_loss_and_fill_the_boxes(composer: Composer, regions: list[Region]) -> None:
    losses: list[float] = []
    composer.place(regions)
    latents = inputs(1)["sample"]
    for _ in range(8):
        loss, slope = composer.slope(latents, torch.tensor(400), states(1), regions)
        latents = latents - 0.5 * slope
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    seen: list[int] = []
    made = [make(composer, regions, rate=r, on_update=lambda i, loss: seen.append(i)) for r in (0.0, 5.0)]
    assert seen == list(range(STEPS)) and not torch.equal(*made)


def test_a_region_has_the_concepts_own_layers(unet: Any, composer: Composer, regions: list[Region]) -> None:
    """One box over everything is a model whose cross-attention has the concept merged in."""
    concept = regions[0].concept
    assert concept is not None
    whole = Region((0.0, 0.0, 1.0, 1.0), states(1), states(2), (1,), concept)
    merged, at = small_unet(), ("attn2.to_k", "attn2.to_v", "attn2.to_out.0")
    for path, change in lorac.factors(concept).items():
        if path.endswith(at):
            merged.get_submodule(path).weight += (change.a @ change.b).mT
    found = make(composer, [whole], rate=0.0, begins_in_boxes=False)
    base, wanted = plainly(unet), plainly(merged)
    assert_parity(found, wanted, base)


def test_rejects_regions_and_adapters_that_do_not_fit(unet: Any, composer: Composer, regions: list[Region]) -> None:
    with refuses("input_mismatch", match="room for 2"):
        composer.place([*regions, regions[0]])
    with refuses("input_mismatch", match="7 tokens"):
        composer.place([Region(LEFT, torch.zeros(7, WIDTH), torch.zeros(7, WIDTH), (1,))])
    large = lorac.compile(unet, {"large": lorac.LoRA(r=3, targets=["attn2.to_out.0"])}).adapters["large"]
    with refuses("shape_mismatch", match="rank 3"):
        composer.place([Region(LEFT, states(1), states(2), (1,), large)])
    with refuses("input_mismatch", match="nothing else, and one has text_embeds"):
        composer(inputs(1)["sample"], prompt_xl(1), states(2), [], steps=1)
    with refuses("input_mismatch", match="none of the attentions to count has maps of 2 x 2"):
        Composer(unet, scheduler(), tokens=TOKENS, stride=4)(
            inputs(1)["sample"], states(1), states(2), [Region(LEFT, states(1), states(2), (1,))], steps=1
        )


@pytest.mark.slow  # one more program; the regions themselves are compiled in test_attention.py
def test_any_engine_denoises(unet: Any, composer: Composer, regions: list[Region]) -> None:
    other = Composer(unet, scheduler(), tokens=TOKENS, r=2, stride=1, target="onnxruntime")
    options: Any = {"steps": 10, "guidance": 3.0, "rate": 2.0, "updates": 3}
    for height, width in ((8, 8), (8, 12)):
        noise = inputs(1, height, width)["sample"]
        made = [one(noise, states(1), states(2), regions, **options) for one in (composer, other)]
        assert_close(made[1], made[0])
