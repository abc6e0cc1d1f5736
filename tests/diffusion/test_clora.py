"""CLoRA's loss, masks and fusion by hand, and its loop on a U-Net of random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lorac
from lorac.diffusion.clora import ConceptPass, ContrastiveComposer, add_background, contrast, fuse, subject_mask
from lorac.testing import assert_close
from tests.diffusion.small_unet import (
    inputs,
    noisy,
    prompt_xl,
    sample_plainly,
    scheduler,
    small_unet,
    small_unet_xl,
    states,
)
from tests.limits import ROWS, assert_apart, decimals
from tests.refusing import refuses

pytest.importorskip("diffusers")
STEPS = 4
GROUPS = [[(0, 1), (1, 1), (2, 1)], [(0, 3), (1, 3), (2, 3)]]


@pytest.fixture(scope="module")
def unet() -> Any:
    return small_unet()


@pytest.fixture(scope="module")
def loras(unet: Any) -> dict[str, lorac.Adapter]:
    variant = lorac.LoRA(r=2, targets=["to_q", "to_v", "conv1"])
    made = dict(lorac.compile(unet, {"cat": variant, "dog": variant, "same": variant}, active=None).adapters)
    return {name: noisy(made[name], seed=n, size=0.2 * (name != "same")) for n, name in enumerate(made)}


@pytest.fixture(scope="module")
def composer(unet: Any, loras: dict[str, lorac.Adapter]) -> ContrastiveComposer:
    return ContrastiveComposer(unet, scheduler(), loras, stride=1)


@pytest.fixture(scope="module")
def passes() -> list[ConceptPass]:
    first = ConceptPass(states(1), states(2))
    return [
        first,
        ConceptPass(states(3), states(2), "cat", 1.0, (1,)),
        ConceptPass(states(4), states(2), "dog", 0.7, (3,)),
    ]


# ── Loss, masks and fusion ───────────────────────────────────────────────────────────────────────────────────────────
def test_the_loss_by_hand() -> None:
    one, two, *_ = torch.eye(4)
    found = torch.stack([contrast(torch.stack(maps), [0, 0, 1, 1]) for maps in ([one, one, two, two], [one] * 4)])
    assert decimals(found, 6) == [0.239545, 1.098612]
    with refuses("input_mismatch", match="no concept has two maps"):
        contrast(torch.eye(2), [0, 1])


def test_the_loss_sees_the_shape_of_maps_alone() -> None:
    maps, concepts = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(0)), [0, 0, 1, 1, 1]
    wanted = contrast(maps, concepts)
    assert wanted.shape == (2,)
    assert_close(contrast(maps * torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0])[:, None] + 0.25, concepts), wanted)
    assert_close(contrast(maps[..., torch.randperm(16)], concepts), wanted)


def test_a_mask_holds_values_above_a_share_of_the_peak() -> None:
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    peak = torch.exp(-((rows - 2).square() + (columns - 3).square()) / 4)
    assert torch.equal(subject_mask(peak[..., None], 0.3), peak > 0.3)
    words = torch.stack([peak, 0.1 * peak.roll(3, 1)], -1)
    assert torch.equal(subject_mask(words, 0.3, "sum"), words.sum(-1) > 0.3 * words.sum(-1).max())
    assert torch.equal(subject_mask(words, 0.3), (peak > 0.3) | (peak.roll(3, 1) > 0.3))


def test_every_pixel_has_a_prediction() -> None:
    masks = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    masks[0, 0, :2], masks[0, 1, 3:] = True, True
    weights = add_background(masks)
    assert torch.equal(weights.sum(1), torch.ones(1, 4, 4))
    predictions = torch.stack([torch.full((1, 3, 4, 4), float(j)) for j in range(3)])
    assert fuse(predictions, weights)[0, 0, :, 0].tolist() == [1.0, 1.0, 0.0, 2.0]
    masks[0, 1, 1:] = True  # a row that two LoRAs have
    assert fuse(predictions, add_background(masks))[0, 0, :, 0].tolist() == [1.0, 1.5, 2.0, 2.0]
    first = torch.zeros(1, 4, 4, dtype=torch.bool)
    first[:, 0] = True
    weights = add_background(masks, first)
    assert fuse(predictions, weights)[0, 0, :, 0].tolist() == [0.5, 1.5, 2.0, 2.0]
    wide = torch.arange(3.0).reshape(3, 1, 1, 1, 1).expand(3, 1, 2, 8, 8)
    assert fuse(wide, weights)[0, 0, :, 0].tolist() == [0.5, 0.5, 1.5, 1.5, 2.0, 2.0, 2.0, 2.0]
    assert fuse(wide, weights, "bilinear")[0, 0, :3, 0].tolist() == [0.5, 0.75, 1.25]


# ── The loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def make(composer: ContrastiveComposer, passes: list[ConceptPass], **options: Any) -> Tensor:
    return composer(inputs(2)["sample"], passes, steps=STEPS, guidance=3.0, **options)


def plainly(unet: Any) -> Tensor:
    """Sampling by the model alone."""
    return sample_plainly(unet, inputs(2)["sample"], [states(1), states(2)], STEPS)


@pytest.mark.medium("first steps of the same composition")
def test_samples_as_the_model_without_loras(unet: Any, composer: ContrastiveComposer) -> None:
    wanted = plainly(unet)
    assert torch.equal(make(composer, [ConceptPass(states(1), states(2))]), wanted)
    same = [ConceptPass(states(1), states(2)), ConceptPass(states(1), states(2), "same", 1.0, (1,))]
    assert (make(composer, same) - wanted).abs().max() < ROWS[torch.float32] * wanted.abs().max()


def test_passes_added_conditions_to_an_xl_unet() -> None:
    unet, latents = small_unet_xl(), inputs(2)["sample"]
    variant = lorac.LoRA(r=2, targets=["to_q"])
    composer = ContrastiveComposer(unet, scheduler(), {"cat": variant}, stride=1)
    given = [ConceptPass(prompt_xl(1), prompt_xl(2)), ConceptPass(prompt_xl(3), prompt_xl(4), "cat", words=(1,))]
    with torch.no_grad():
        found = composer.predict(latents, torch.tensor(400), given, 3.0)
    for noise, seed in zip(found.flatten(0, 1), (1, 3, 2, 4), strict=True):
        prompt = prompt_xl(seed)
        added = {name: tensor.expand(2, -1) for name, tensor in prompt.added.items()}
        wanted = unet(latents, torch.full((2,), 400.0), states(seed).expand(2, -1, -1), added_cond_kwargs=added).sample
        assert (noise - wanted).abs().max() < ROWS[torch.float32] * wanted.abs().max()
    composer(latents, given, [[(0, 1), (1, 1)]], steps=1)
    with refuses("input_mismatch", match="text_embeds, time_ids"):
        composer(latents, [ConceptPass(prompt_xl(1), states(2))], steps=1)


def test_rows_equal_separate_passes(
    composer: ContrastiveComposer, passes: list[ConceptPass], loras: dict[str, lorac.Adapter]
) -> None:
    latents, t = inputs(2)["sample"], torch.tensor(400)
    with torch.no_grad():
        found = composer.predict(latents, t, passes, 3.0)
        maps = composer.maps(composer.engine, latents, 3)
        for j, one in enumerate(passes):
            choice = composer.always | ({one.adapter: one.strength} if one.adapter else {})
            given = {"timestep": t.float().expand(2), "encoder_hidden_states": one.states.expand(2, -1, -1)}
            alone = composer.eager(latents, **given, adapters=choice).sample
            assert (found[0, j] - alone).abs().max() < ROWS[torch.float32] * alone.abs().max()
            own = composer.maps(composer.eager, latents, 1)[:, 0]
            assert (maps[:, j] - own).abs().max() < ROWS[torch.float32]
    assert_apart(found[0, 1], found[0, 0])


def test_a_small_update_lowers_the_loss(composer: ContrastiveComposer, passes: list[ConceptPass]) -> None:
    latents, t = inputs(2)["sample"], torch.tensor(400)
    before, slope = composer.slope(latents, t, passes, GROUPS)
    after, _ = composer.slope(latents - 0.01 * slope / slope.abs().max(), t, passes, GROUPS)
    assert (after < before).all()


@pytest.mark.medium("test_a_small_update_lowers_the_loss")
def test_first_steps_update(composer: ContrastiveComposer, passes: list[ConceptPass]) -> None:
    seen: list[int] = []
    options: dict[str, Any] = {"groups": GROUPS, "updates": 2, "refinements": 3}
    moved = make(composer, passes, **options, on_update=lambda step, _: seen.append(step))
    assert seen == [0, 0, 0, 1]
    assert_apart(moved, make(composer, passes))


class Attention:
    """Attention of diffusers, which keeps its probabilities."""

    def __init__(self, attention: Any, kept: list[Tensor]) -> None:
        self.scores, self.kept = type(attention).get_attention_scores.__get__(attention), kept
        attention.get_attention_scores = self

    def __call__(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        probabilities: Tensor = self.scores(query, key, mask)
        self.kept.append(probabilities)
        return probabilities


def watch(unet: Any, lora: lorac.Adapter | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the noise of a merged copy of a U-Net, and maps (rows, 4, 4, tokens) of its cross-attention at 4 x 4."""
    from diffusers.models.attention_processor import AttnProcessor

    model = copy.deepcopy(unet if lora is None else lorac.merge_into(unet, {"a": lora}, "a"))
    model.set_attn_processor(AttnProcessor())
    kept: list[Tensor] = []
    Attention(model.mid_block.attentions[0].transformer_blocks[0].attn2, kept)

    def predict(latents: Tensor, t: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
        kept.clear()
        noise = model(latents.expand(len(prompts), -1, -1, -1), t, prompts).sample
        return noise, kept[0].unflatten(0, (len(prompts), -1)).mean(1).reshape(len(prompts), 4, 4, -1)

    return predict


def plain_loss(maps: list[Tensor]) -> Tensor:
    """NT-Xent of GROUPS, pair by pair."""
    chosen = [(n, maps[at][..., word].flatten()) for n, group in enumerate(GROUPS) for at, word in group]
    scaled = [(n, (one - one.min()) / (one.max() - one.min())) for n, one in chosen]
    losses = []
    for i, (group, one) in enumerate(scaled):
        scores = [(n, (torch.cosine_similarity(one, other, 0) / 0.5).exp()) for n, other in scaled]
        others = torch.stack([score for n, score in scores if n != group]).sum()
        losses += [-(s / (s + others)).log() for j, (n, s) in enumerate(scores) if n == group and j != i]
    return torch.stack(losses).mean()


SETTINGS: dict[str, Any] = {"steps": 3, "guidance": 3.0, "rate": 40.0, "updates": 2, "refinements": 2, "threshold": 0.4}


@pytest.fixture(scope="module")
def doubled(unet: Any, loras: dict[str, lorac.Adapter]) -> ContrastiveComposer:
    return ContrastiveComposer(copy.deepcopy(unet).double(), scheduler(), loras, stride=2)


@pytest.fixture(scope="module")
def peaked() -> list[ConceptPass]:
    """Passes whose words are attended to here and there; the first has one, the last two."""
    prompts, negative = [4 * states(seed).double() for seed in (1, 3, 4)], states(2).double()
    cat, dog = (ConceptPass(p, negative, name) for p, name in zip(prompts[1:], ("cat", "dog"), strict=True))
    return [ConceptPass(prompts[0], negative, words=(2,)), replace(cat, words=(1,)), replace(dog, words=(3, 4))]


@pytest.mark.medium("test_the_loop_is_that_of_the_authors")
def test_every_setting_of_the_loop_acts(doubled: ContrastiveComposer, peaked: list[ConceptPass]) -> None:
    noise = inputs(1)["sample"].double()
    found = doubled(noise, peaked, GROUPS, **SETTINGS)
    for other in (
        {"reduce": "sum"},
        {"decays": True},
        {"threshold": 0.2},
        {"upsampling": "bilinear"},
        {"negative_maps": True},
        {"noise_first": True},
    ):
        assert_apart(doubled(noise, peaked, GROUPS, **{**SETTINGS, **other}), found)
    assert_apart(doubled(noise, [replace(peaked[0], words=()), *peaked[1:]], GROUPS, **SETTINGS), found)


@pytest.mark.parametrize("theirs", [True, False])
def test_the_loop_is_that_of_the_authors(
    unet: Any,
    loras: dict[str, lorac.Adapter],
    doubled: ContrastiveComposer,
    peaked: list[ConceptPass],
    theirs: bool,
) -> None:
    """Written from their code (76def7c): their maps and order of noise and update, or those of the defaults here."""
    host, noise = copy.deepcopy(unet).double(), inputs(1)["sample"].double()
    prompts = [torch.stack([peaked[0].negative, one.states]) for one in peaked]
    models = [watch(host, loras[one.adapter] if one.adapter else None) for one in peaked]
    times = scheduler()
    times.set_timesteps(4)
    latents = noise

    def predict(latents: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = [model(latents, t, both) for model, both in zip(models, prompts, strict=True)]
        maps = [rows.mean(0) if theirs else rows[1] for _, rows in found]
        return torch.stack([both for both, _ in found]).detach(), maps

    for step, t in enumerate(times.timesteps):
        for _ in range((2, 1, 1, 0)[step]):
            with torch.enable_grad():
                moving = latents.requires_grad_()
                predicted, maps = predict(moving, t)
                loss = plain_loss(maps)
                latents = (moving - SETTINGS["rate"] * torch.autograd.grad(loss, moving)[0]).detach()
        with torch.no_grad():
            if not theirs or step == 3:
                predicted, maps = predict(latents, t)
            masks = torch.stack(
                [
                    torch.stack([one[..., word] > 0.4 * one[..., word].max() for word in given.words]).any(0)
                    for one, given in zip(maps, peaked, strict=True)
                ]
            )
            masks[0] |= ~masks.any(0)
            assert 0 < masks.float().mean() < 1
            masks = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
            plain, told = (
                sum(n * m for n, m in zip(predicted[:, side], masks, strict=True)) / masks.sum(0) for side in (0, 1)
            )
            latents = times.step(plain + 3.0 * (told - plain), t, latents).prev_sample
    given = {**SETTINGS, "steps": 4, "updates": 3, "negative_maps": theirs, "noise_first": theirs}
    found = doubled(noise, peaked, GROUPS, **given)
    assert (found - latents).abs().max() < ROWS[torch.float64] * latents.abs().max()


@pytest.mark.slow  # one more program
def test_any_engine_denoises(
    unet: Any, composer: ContrastiveComposer, loras: dict[str, lorac.Adapter], passes: list[ConceptPass]
) -> None:
    other = ContrastiveComposer(unet, scheduler(), loras, stride=1, target="onnxruntime")
    for height, width in ((8, 8), (8, 12)):
        noise = inputs(1, height, width)["sample"]
        made = [one(noise, passes, GROUPS, steps=10, guidance=3.0, rate=0.5, updates=2) for one in (composer, other)]
        assert_close(made[1], made[0])
