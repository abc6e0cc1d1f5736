"""Pipelines that make videos: models with frames, whose statistics and contexts the pipelines use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
import lorac.diffusion
from examples.pipelines import TOKENS, t5, tokenizer
from tests.limits import ROWS
from tests.refusing import refuses

diffusers = pytest.importorskip("diffusers")
WIDTH = 32


def wan(folder: Path) -> Any:
    words = tokenizer(folder)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        ffn_dim=WIDTH,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(base_dim=3, dim_mult=[1] * 4, num_res_blocks=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    text_encoder = t5(words, WIDTH)
    return diffusers.WanPipeline(words, text_encoder, vae.eval(), scheduler, transformer.eval())


def ltx(folder: Path) -> Any:
    words = tokenizer(folder)
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=WIDTH,
        num_layers=1,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    with torch.no_grad():
        vae.latents_mean.uniform_(-1, 1)
        vae.latents_std.uniform_(0.5, 2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.LTXPipeline(scheduler, vae.eval(), t5(words, WIDTH), words, transformer.eval())


KINDS = {"wan": wan, "ltx": ltx}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def build(kind: str, folder: Path) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = KINDS[kind](folder)
    made.set_progress_bar_config(disable=True)
    return made


def film(
    pipeline: Any, prompt: Any = "a cat", frames: int = 9, height: int = 32, width: int = 64, **options: Any
) -> torch.Tensor:
    found: torch.Tensor = pipeline(
        prompt,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=2,
        max_sequence_length=TOKENS,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **options,
    ).frames
    return found


@pytest.mark.medium("LTX", keep=["ltx"])
def test_films_as_the_original_without_adapters(kind: str, tmp_path: Path) -> None:
    original = build(kind, tmp_path)
    variant = lorac.LoRA(r=2, targets=["to_q", "q"])
    made = lorac.diffusion.compile(original, {"one": variant})
    with torch.no_grad():
        for tensor in made.compiled.adapters["one"].parameters():
            tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    wanted = film(original)
    pairs = {"prompt": ["a cat", "o"], "num_videos_per_prompt": 2}
    each, base = film(made, adapters=["one", None], **pairs), film(original, **pairs)
    assert [*map(torch.equal, each, base)] == [False, False, True, True]
    assert torch.equal(film(made, attention_kwargs={"scale": 0.0}), wanted)
    made.disable_lora()
    assert torch.equal(film(made), wanted)


def test_parts_have_the_values_of_their_models(tmp_path: Path) -> None:
    original = build("ltx", tmp_path)
    made = lorac.diffusion.compile(original)
    assert torch.equal(made.vae.latents_mean, original.vae.latents_mean)
    assert made.vae.spatial_compression_ratio == original.vae.spatial_compression_ratio
    assert made.transformer.rope is original.transformer.rope, "it has no weights that an adapter could change"
    assert made.transformer.proj_in is not original.transformer.proj_in
    with refuses("unknown_attribute", match="has no 'unpatchify'"):
        _ = made.transformer.unpatchify


@pytest.mark.slow("a program of each")
@pytest.mark.parametrize(("kind", "part"), [("wan", "transformer"), ("ltx", "vae")])
def test_a_program_films_at_other_sizes(kind: str, part: str, tmp_path: Path) -> None:
    original = build(kind, tmp_path)
    made = lorac.diffusion.compile(original, target="onnxruntime", parts=[part])
    for sizes in ({}, {"frames": 17, "height": 64, "width": 96}):
        wanted = film(original, **sizes)
        assert (film(made, **sizes) - wanted).abs().max() < ROWS[torch.float32] * wanted.abs().max()


def test_rejects_a_model_that_needs_more_than_its_configuration_says(tmp_path: Path) -> None:
    with refuses("example_inputs_needed", match="num_frames"):
        lorac.diffusion.compile(build("ltx", tmp_path), target="onnxruntime", parts=["transformer"])
