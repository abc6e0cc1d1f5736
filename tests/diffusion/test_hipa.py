"""HiPA: the operators of its loss by hand, one step of both predictions, the folded timestep, and a training."""

import functools

import pytest
import torch

import lorac
from examples.pipelines import tiny_unet, tiny_vae
from lorac.diffusion import high_frequencies as high
from lorac.diffusion import hipa
from lorac.testing import assert_close
from tests.limits import assert_vanishes
from tests.parity import assert_parity
from tests.refusing import refuses

_DRAWN = torch.Generator().manual_seed(4)
IMAGES = torch.randn(2, 3, 16, 16, generator=_DRAWN, dtype=torch.float64)
OTHERS = torch.randn(2, 3, 16, 16, generator=_DRAWN, dtype=torch.float64)
NOISE, CONTEXT = torch.randn(2, 4, 16, 16, generator=_DRAWN), torch.randn(2, 7, 16, generator=_DRAWN)
FLAT = torch.full((1, 3, 16, 16), 0.7, dtype=torch.float64)


# ── The loss ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_high_pass():
    found = high.high_pass(IMAGES)
    assert_close(high.high_pass(found), found)
    assert_vanishes(high.high_pass(FLAT), FLAT)
    assert_vanishes(high.high_pass(IMAGES - found), IMAGES)
    board = (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16)).double().expand(1, 3, 16, 16)
    assert_close(high.high_pass(board), board)


def test_edges_of_a_step():
    step = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    step[..., 4:] = 1
    found = high.edges(step)
    assert_close(found[..., 3:5], torch.full((1, 1, 8, 2), (16 + 1e-8) ** 0.5, dtype=torch.float64))
    rest = torch.cat([found[..., :3], found[..., 5:]], -1)
    assert_close(rest, torch.full_like(rest, 1e-4))
    assert_close(high.edges(FLAT), torch.full((1, 1, 16, 16), 1e-4, dtype=torch.float64))


def test_only_equal_images_have_no_loss():
    loss = high.HighFrequencyLoss()
    assert float(loss(IMAGES, IMAGES)) == 0
    assert all(float(part) > 0.1 for part in loss.parts(IMAGES, OTHERS).values())


def test_compares_high_frequencies_by_structure():
    loss = high.HighFrequencyLoss(between=high.structural_distance)
    assert float(loss(IMAGES, IMAGES)) == 0
    shifted = IMAGES.roll(5, -1)
    parts, plain = (one.parts(shifted, IMAGES) for one in (loss, high.HighFrequencyLoss()))
    assert all(float(parts[name]) != float(plain[name]) for name in ("fourier", "edge"))


def test_a_constant_moves_the_spatial_part_alone():
    loss = high.HighFrequencyLoss()
    before, after = loss.parts(IMAGES, OTHERS), loss.parts(IMAGES + 0.5, OTHERS)
    assert float(after["spatial"]) > float(before["spatial"])
    for name in ("fourier", "edge"):
        assert_close(after[name], before[name])


@pytest.mark.parametrize(
    ("which", "parts"),
    [("none", ["spatial"]), ("edge", ["spatial", "edge"]), ("fourier", ["spatial", "fourier"])],
)
def test_parts_are_chosen(which, parts):
    loss = high.HighFrequencyLoss(high=which, weight=3.0)
    found = loss.parts(IMAGES, OTHERS)
    assert list(found) == parts
    assert_close(loss(IMAGES, OTHERS), found["spatial"] + 3 * sum(list(found.values())[1:], torch.zeros(()).double()))
    with refuses("option_error"):
        high.HighFrequencyLoss(high="edges")


def test_maps_divided_by_their_largest_value_are_blind_to_contrast():
    loss = high.HighFrequencyLoss(by_maximum=True)
    parts = loss.parts(IMAGES, 3 * IMAGES)
    assert_vanishes(parts["fourier"], torch.ones((), dtype=torch.float64))
    assert float(loss.parts(IMAGES, OTHERS)["fourier"]) > 0.05


def test_the_spectrum():
    place = torch.arange(16, dtype=torch.float64)
    wave = torch.cos(torch.pi * place * 5 / 8).expand(1, 1, 16, 16)  # 5 of 8 bins
    assert high.radial_spectrum(wave).argmax() == 5
    assert high.closed_gap(IMAGES, FLAT, IMAGES) == 1 and high.closed_gap(FLAT, FLAT, IMAGES) == 0


# ── One step ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_both_predictions_give_the_clean_latents():
    clean, noise = IMAGES, OTHERS
    for alpha_bar in (0.0046601, 0.5):
        noisy = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise
        velocity = alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * clean
        assert_close(hipa.predict_clean(noisy, noise, alpha_bar, "epsilon"), clean)
        assert_close(hipa.predict_clean(noisy, velocity, alpha_bar, "v_prediction"), clean)
    with refuses("choice_error", match="no rule turns 'noise' into images"):
        hipa.OneStep(torch.nn.Identity(), timestep=1, alpha_bar=0.5, predicts="noise")


def scheduler():
    from diffusers import DDIMScheduler

    return DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


@functools.cache
def models():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_unet(16), tiny_vae()


@functools.cache
def step(folds=True):
    unet, vae = models()
    return hipa.OneStep.of(unet, scheduler(), vae=vae, folds=folds).eval()


@torch.no_grad()
def test_the_step_is_the_pipelines_own():
    unet, vae = models()
    given = scheduler()
    assert round(float(given.alphas_cumprod[999]), 7) == 0.0046601
    given.set_timesteps(1)
    predicted = unet(NOISE, 999, CONTEXT).sample
    signal, noise = (value**0.5 for value in (given.alphas_cumprod[999], 1 - given.alphas_cumprod[999]))
    wanted = vae.decode((NOISE - noise * predicted) / signal / vae.config.scaling_factor).sample
    assert_close(step(folds=False)(NOISE, CONTEXT), wanted)


@torch.no_grad()
def test_the_folded_timestep_is_the_same_step_without_its_layers():
    assert_close(step()(NOISE, CONTEXT), step(folds=False)(NOISE, CONTEXT))
    assert not any("time_emb" in path for path in lorac.sites(step()))
    assert any("time_emb" in path for path in lorac.sites(step(folds=False)))
    assert models()[0].time_embedding.linear_1.weight.requires_grad  # the U-Net itself stays as it was


@functools.cache
def adapter():
    made = lorac.compile(step(), {"hipa": hipa.RECIPE}).adapters["hipa"]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15)
    return made


@pytest.mark.medium("training of the same factors")
@torch.no_grad()
def test_the_adapter_fits_the_pipelines_unet():
    compiled = lorac.compile(step(), {"hipa": adapter()})
    assert torch.equal(compiled(NOISE, CONTEXT, adapters=None), step()(NOISE, CONTEXT))
    unet, vae = models()
    parts = lorac.compile({"unet": unet, "vae": vae}, {"hipa": adapter()})
    predicted = parts["unet"](NOISE, torch.tensor(999), CONTEXT).sample
    latents = hipa.predict_clean(NOISE, predicted, step().alpha_bar, "epsilon")
    assert_parity(compiled(NOISE, CONTEXT), vae.decode(latents / step().scaling).sample, step()(NOISE, CONTEXT))


@pytest.mark.slow
@torch.no_grad()
def test_on_onnx_runtime_merged_and_live():
    eager = lorac.compile(step(), {"hipa": adapter()})
    wanted, base = eager(NOISE, CONTEXT), step()(NOISE, CONTEXT)
    for mode in ("live", "baked"):
        emitted = eager.export(target="onnxruntime", mode=mode, example_inputs=(NOISE, CONTEXT))
        assert_parity(emitted(NOISE, CONTEXT), wanted, base)


def test_training_moves_the_factors_alone_and_lowers_the_loss():
    compiled = lorac.compile(step(), {"hipa": lorac.LoRA(r=2, targets=["to_q", "to_v"], exclude=r"vae\..*")})
    assert torch.equal(compiled(NOISE, CONTEXT), step()(NOISE, CONTEXT))
    unet, vae = models()
    with torch.no_grad():
        target = hipa.make_target(
            unet, scheduler(), NOISE, CONTEXT, steps=2, decode=lambda z: vae.decode(z / step().scaling).sample
        )
    losses = hipa.train_one_step(compiled, [(NOISE, CONTEXT, target)] * 6, rate=3e-2)
    assert losses[-1] < losses[0]
    moved = {name.rpartition("/")[2] for name, p in compiled.named_parameters() if p.grad is not None}
    assert moved == {"lora_A", "lora_B"}


# ── Counts ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "rank", "count"),
    [
        ({"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}, 16, 3_319_808),
        ({"cross_attention_dim": 768, "attention_head_dim": 8}, 4, 797_184),
    ],
    ids=["SD 2.1", "SD 1.5"],
)
def test_the_papers_number_of_trained_values(sizes, rank, count):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **sizes)
    sites = [site for path, site in lorac.sites(unet).items() if path.endswith(hipa.RECIPE.targets)]
    assert sum(rank * (site.in_features + site.out_features) for site in sites) == count
